//! The programs the test bed needs, found or installed (Debian).
//!
//! QEMU must be 8 or newer (`igb`, PM capabilities); on Debian 12 that is in the backports suite, which is added by
//! copying the address of the existing Debian source.

use std::fs;
use std::path::Path;
use std::process::Command;

use crate::command::{capture, capture_text, exists};
use crate::error::{Error, Result, file_error};

/// Program, and the package that has it.
const PROGRAMS: [(&str, &str); 14] = [
    ("qemu-system-x86_64", "qemu-system-x86"),
    ("qemu-img", "qemu-utils"),
    ("mkfs.ext4", "e2fsprogs"),
    ("debootstrap", "debootstrap"),
    ("iasl", "acpica-tools"),
    ("acpiexec", "acpica-tools"),
    ("busybox", "busybox-static"),
    ("cpio", "cpio"),
    ("zstd", "zstd"),
    ("xz", "xz-utils"),
    ("depmod", "kmod"),
    ("setpriv", "util-linux"),
    COMPILER,
    ("curl", "curl"),
];
/// What the fuzz targets need: libFuzzer is written in C++.
const COMPILER: (&str, &str) = ("c++", "g++");
const OLDEST_QEMU: u32 = 8;
const SOURCES: &str = "/etc/apt/sources.list.d";
const ADDED: &str = "/etc/apt/sources.list.d/dormouse-testbed-backports.sources";

/// Makes sure every program is there; installs what is absent when running as root.
pub fn ensure() -> Result<()> {
    let note = format!(
        " (QEMU {OLDEST_QEMU} or newer: on Debian 12 from bookworm-backports, \
         `apt-get install -t bookworm-backports qemu-system-x86`)"
    );
    ensure_all(&PROGRAMS, &note)
}

/// The same for the fuzz targets alone: installs what is absent when running as root.
pub fn ensure_compiler() -> Result<()> {
    ensure_all(&[COMPILER], "")
}

/// The address of the Debian mirror that this machine's own packages come from.
pub fn mirror() -> Result<String> {
    let codename = codename()?;
    let source = source_files().iter().find_map(|text| debian_source(text, &codename));
    source.map(|source| source.uri).ok_or_else(|| Error::Missing {
        what: "an apt source for Debian, to take its address from".to_owned(),
        how: format!("add `deb http://deb.debian.org/debian {codename} main`"),
    })
}

fn ensure_all(programs: &[(&str, &'static str)], note: &str) -> Result<()> {
    let missing = missing(programs);
    if missing.is_empty() {
        return Ok(());
    }
    let how = format!("apt-get install {}{note}", missing.join(" "));
    if !is_root()? || !exists("apt-get") {
        return Err(Error::Missing { what: missing.join(", "), how });
    }
    eprintln!("testbed: installing {}", missing.join(" "));
    install(&missing)?;
    let left = self::missing(programs);
    if left.is_empty() { Ok(()) } else { Err(Error::Missing { what: left.join(", "), how }) }
}

/// Makes sure that the suites with the kernels are known to apt, which `apt-get download` needs.
pub fn ensure_kernel_suites() -> Result<()> {
    if !is_root()? {
        return Err(Error::Missing {
            what: "Debian kernel packages in the apt lists".to_owned(),
            how: "run `cargo testbed prepare` once as root, or add the backports suite and `apt-get update`"
                .to_owned(),
        });
    }
    add_backports()?;
    apt(&["update", "-q"])
}

fn missing(programs: &[(&str, &'static str)]) -> Vec<&'static str> {
    let mut packages: Vec<&'static str> = Vec::new();
    for &(program, package) in programs {
        let good = exists(program) && (package != "qemu-system-x86" || qemu_is_new_enough());
        if !good && !packages.contains(&package) {
            packages.push(package);
        }
    }
    packages
}

fn install(packages: &[&str]) -> Result<()> {
    apt(&["update", "-q"])?;
    let mut plain: Vec<&str> = packages.to_vec();
    if packages.contains(&"qemu-system-x86") {
        plain.retain(|package| *package != "qemu-system-x86");
        add_backports()?;
        apt(&["update", "-q"])?;
        let suite = format!("{}-backports", codename()?);
        let with_suite =
            ["install", "-q", "-y", "--no-install-recommends", "-t", &suite, "qemu-system-x86", "ipxe-qemu"];
        if apt(&with_suite).is_err() {
            // A release whose main suite is new enough has no need of backports.
            apt(&["install", "-q", "-y", "--no-install-recommends", "qemu-system-x86"])?;
        }
    }
    if plain.is_empty() {
        return Ok(());
    }
    let mut words = vec!["install", "-q", "-y", "--no-install-recommends"];
    words.extend(plain);
    apt(&words)
}

fn apt(words: &[&str]) -> Result<()> {
    capture(Command::new("apt-get").env("DEBIAN_FRONTEND", "noninteractive").args(words)).map(drop)
}

fn qemu_is_new_enough() -> bool {
    let Ok(text) = capture_text(Command::new("qemu-system-x86_64").arg("--version")) else { return false };
    text.split("version ")
        .nth(1)
        .and_then(|rest| rest.split('.').next())
        .and_then(|major| major.parse::<u32>().ok())
        .is_some_and(|major| major >= OLDEST_QEMU)
}

/// Adds the backports suite unless some source already names it.
fn add_backports() -> Result<()> {
    let suite = format!("{}-backports", codename()?);
    let sources = source_files();
    if sources.iter().any(|text| active_lines(text).any(|line| line.contains(&suite))) {
        return Ok(());
    }
    let Some(source) = sources.iter().find_map(|text| debian_source(text, &codename().ok()?)) else {
        return Err(Error::Missing {
            what: format!("an apt source for Debian, to take the address of {suite} from"),
            how: format!("add `deb http://deb.debian.org/debian {suite} main` and run `apt-get update`"),
        });
    };
    let mut stanza = format!("Types: deb\nURIs: {}\nSuites: {suite}\nComponents: main\n", source.uri);
    if let Some(key) = source.signed_by {
        stanza.push_str(&format!("Signed-By: {key}\n"));
    }
    fs::write(ADDED, stanza).map_err(file_error("write", ADDED))
}

/// Where an existing source gets Debian from.
#[derive(Debug, PartialEq, Eq)]
struct Source {
    uri: String,
    signed_by: Option<String>,
}

/// Finds the source of suite `codename` in `text`, in either of apt's two formats.
fn debian_source(text: &str, codename: &str) -> Option<Source> {
    for stanza in text.split("\n\n") {
        let field = |name: &str| {
            active_lines(stanza).find_map(|line| line.strip_prefix(name)?.strip_prefix(':').map(str::trim))
        };
        if let (Some(uris), Some(suites)) = (field("URIs"), field("Suites"))
            && suites.split_whitespace().any(|suite| suite == codename)
        {
            let uri = uris.split_whitespace().next()?.to_owned();
            return Some(Source { uri, signed_by: field("Signed-By").map(str::to_owned) });
        }
    }
    active_lines(text).find_map(|line| one_line_source(line, codename))
}

/// `deb [options] uri suite component...`
fn one_line_source(line: &str, codename: &str) -> Option<Source> {
    let rest = line.strip_prefix("deb ")?.trim_start();
    let (options, rest) = match rest.strip_prefix('[') {
        Some(bracketed) => bracketed.split_once(']')?,
        None => ("", rest),
    };
    let mut words = rest.split_whitespace();
    let uri = words.next()?.to_owned();
    if words.next()? != codename {
        return None;
    }
    let signed_by =
        options.split_whitespace().find_map(|option| option.strip_prefix("signed-by=")).map(str::to_owned);
    Some(Source { uri, signed_by })
}

fn active_lines(text: &str) -> impl Iterator<Item = &str> {
    text.lines().filter(|line| !line.trim_start().starts_with('#'))
}

fn source_files() -> Vec<String> {
    let mut texts = Vec::new();
    if let Ok(entries) = fs::read_dir(SOURCES) {
        for path in entries.flatten().map(|entry| entry.path()) {
            let known = path.extension().is_some_and(|e| e == "list" || e == "sources");
            if known && let Ok(text) = fs::read_to_string(&path) {
                texts.push(text);
            }
        }
    }
    if let Ok(text) = fs::read_to_string("/etc/apt/sources.list") {
        texts.push(text);
    }
    texts
}

fn codename() -> Result<String> {
    let path = Path::new("/etc/os-release");
    let text = fs::read_to_string(path).map_err(file_error("read", path))?;
    Ok(text
        .lines()
        .find_map(|line| line.strip_prefix("VERSION_CODENAME="))
        .unwrap_or("bookworm")
        .trim_matches('"')
        .to_owned())
}

/// Whether this process may do everything.
pub fn is_root() -> Result<bool> {
    Ok(capture_text(Command::new("id").arg("-u"))?.trim() == "0")
}

#[cfg(test)]
mod tests {
    use super::*;

    const NEW_FORMAT: &str = "Types: deb\n# URIs: http://old.example/\nURIs: http://mirror.example/debian\n\
        Suites: bookworm bookworm-updates\nComponents: main\nSigned-By: /usr/share/keyrings/d.gpg\n\n\
        Types: deb\nURIs: http://security.example/\nSuites: bookworm-security\nComponents: main\n";

    #[test]
    fn the_address_of_debian_is_found_in_the_stanza_format() {
        let source = debian_source(NEW_FORMAT, "bookworm").unwrap();
        assert_eq!(source.uri, "http://mirror.example/debian");
        assert_eq!(source.signed_by.as_deref(), Some("/usr/share/keyrings/d.gpg"));
    }

    #[test]
    fn the_address_of_debian_is_found_in_the_one_line_format() {
        let text = "# deb http://no.example/ bookworm main\n\
            deb http://s.example/ bookworm-security main\n\
            deb [arch=amd64 signed-by=/k.gpg] http://m.example/debian bookworm main contrib\n";
        let source = debian_source(text, "bookworm").unwrap();
        assert_eq!(
            source,
            Source { uri: "http://m.example/debian".into(), signed_by: Some("/k.gpg".into()) }
        );
    }

    #[test]
    fn a_package_is_missing_once_when_any_of_its_programs_is() {
        let programs = [("sh", "dash"), ("no-such-program", "absent"), ("nor-this-one", "absent")];
        assert_eq!(missing(&programs), ["absent"]);
    }

    #[test]
    fn a_file_without_debian_has_no_address() {
        assert_eq!(debian_source("deb https://deb.example/ cloud main\n", "bookworm"), None);
    }
}

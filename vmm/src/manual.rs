//! Completions for shells and manual pages (man(7)), made from the same description of the command line that reads it.

use std::io;
use std::path::{Path, PathBuf};

use clap::Command;
use clap_complete::Shell;

/// Manual pages that cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum ManualError {
    /// The directory does not take them.
    #[error("man: manual pages cannot be written to {}: {cause}; name a directory that is yours, or write them elsewhere and install them", directory.display())]
    Directory {
        /// The directory.
        directory: PathBuf,
        /// Why.
        cause: io::Error,
    },
    /// The page could not be made.
    #[error("man: the manual page cannot be made: {0}")]
    Page(io::Error),
}

/// The script that completes `command` in `shell`.
pub fn completions(shell: Shell, mut command: Command) -> String {
    let name = command.get_name().to_owned();
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut command, name, &mut script);
    String::from_utf8_lossy(&script).into_owned()
}

/// The manual page of the command itself.
///
/// # Errors
/// See [`ManualError`].
pub fn page(command: Command) -> Result<String, ManualError> {
    let mut page = Vec::new();
    clap_mangen::Man::new(command).render(&mut page).map_err(ManualError::Page)?;
    Ok(String::from_utf8_lossy(&page).into_owned())
}

/// Writes the pages of the command and all its subcommands to `directory`, which is made if need be.
///
/// # Errors
/// See [`ManualError`].
pub fn pages(command: Command, directory: &Path) -> Result<(), ManualError> {
    std::fs::create_dir_all(directory)
        .and_then(|()| clap_mangen::generate_to(command, directory))
        .map_err(|cause| ManualError::Directory { directory: directory.to_owned(), cause })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli;
    use crate::client::peer::Scratch;

    #[test]
    fn each_shell_gets_a_script_that_knows_the_options_and_the_commands() {
        for shell in [Shell::Bash, Shell::Zsh, Shell::Fish, Shell::Elvish] {
            let script = completions(shell, cli::shown());
            for word in ["kernel", "device", "doctor", "ctl", "power-policy", "clear-latch", "interval"] {
                assert!(script.contains(word), "{shell}: {word}");
            }
            assert!(!script.contains("dbus-object-path"), "{shell} offers what is refused");
        }
    }

    #[test]
    fn the_page_of_the_command_has_its_options_and_names_its_commands() {
        let page = page(cli::shown()).unwrap();
        assert!(page.contains(".TH dormouse 1") && page.contains("dormouse\\-ctl(1)"), "{page}");
        assert!(page.contains("\\-\\-kernel"), "{page}");
    }

    #[test]
    fn there_is_a_page_for_each_command() {
        let scratch = Scratch::new();
        let directory = scratch.path("share/man/man1");
        pages(cli::shown(), &directory).unwrap();
        for name in
            ["dormouse", "dormouse-ctl", "dormouse-ctl-power-policy", "dormouse-top", "dormouse-doctor"]
        {
            let page = std::fs::read_to_string(directory.join(format!("{name}.1"))).unwrap();
            assert!(page.contains(&format!(".TH {name} 1")), "{name}: {page}");
        }
        scratch.write("plain", "");
        let error = pages(cli::shown(), &scratch.path("plain")).unwrap_err().to_string();
        assert!(error.contains("plain: ") && error.contains("install them"), "{error}");
    }
}

//! The form of a log line as `--log-format` gives it, in Cloud Hypervisor's grammar: text with tokens in braces; a brace of the text is written twice.

use std::fmt;
use std::str::FromStr;
use std::thread;
use std::time::{Duration, SystemTime};

use log::Record;

/// A form that cannot be used.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    /// A token without an end.
    #[error("--log-format: a '{{' is never closed; close it, or write '{{{{' for the brace itself")]
    Open,
    /// An end without a token.
    #[error("--log-format: a '}}' closes nothing; write '}}}}' for the brace itself")]
    Closed,
    /// No such token.
    #[error(
        "--log-format has no '{{{0}}}'; it takes {{boottime}}, {{wallclock}}, {{pid}}, {{tid}}, {{thread}}, {{level}}, {{location}} and {{msg}}"
    )]
    Unknown(String),
}

/// One part of a line.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Part {
    Text(String),
    /// Seconds since the start.
    BootTime,
    /// RFC 3339.
    WallClock,
    Pid,
    Tid,
    Thread,
    Level,
    Location,
    Message,
}

/// The form of a line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogFormat(Vec<Part>);

impl FromStr for LogFormat {
    type Err = FormatError;

    fn from_str(text: &str) -> Result<Self, FormatError> {
        let mut parts = Vec::new();
        let mut rest = text;
        while let Some(at) = rest.find(['{', '}']) {
            let (before, brace) = rest.split_at(at);
            push_text(&mut parts, before);
            if let Some(after) = brace.strip_prefix("{{") {
                push_text(&mut parts, "{");
                rest = after;
            } else if let Some(after) = brace.strip_prefix("}}") {
                push_text(&mut parts, "}");
                rest = after;
            } else {
                let token = brace.strip_prefix('{').ok_or(FormatError::Closed)?;
                let (name, after) = token.split_once('}').ok_or(FormatError::Open)?;
                parts.push(part(name)?);
                rest = after;
            }
        }
        push_text(&mut parts, rest);
        Ok(Self(parts))
    }
}

fn push_text(parts: &mut Vec<Part>, text: &str) {
    match parts.last_mut() {
        _ if text.is_empty() => {}
        Some(Part::Text(before)) => before.push_str(text),
        _ => parts.push(Part::Text(text.to_owned())),
    }
}

fn part(name: &str) -> Result<Part, FormatError> {
    Ok(match name {
        "boottime" => Part::BootTime,
        "wallclock" => Part::WallClock,
        "pid" => Part::Pid,
        "tid" => Part::Tid,
        "thread" => Part::Thread,
        "level" => Part::Level,
        "location" => Part::Location,
        "msg" => Part::Message,
        _ => return Err(FormatError::Unknown(name.to_owned())),
    })
}

impl LogFormat {
    /// Writes a line without its end.
    pub fn write(&self, f: &mut fmt::Formatter<'_>, record: &Record<'_>, now: Duration) -> fmt::Result {
        for part in &self.0 {
            match part {
                Part::Text(text) => f.write_str(text)?,
                Part::BootTime => write!(f, "{:>10.6}", now.as_secs_f64())?,
                Part::WallClock => write!(f, "{}", humantime::format_rfc3339_micros(SystemTime::now()))?,
                Part::Pid => write!(f, "{}", std::process::id())?,
                Part::Tid => write!(f, "{}", rustix::thread::gettid())?,
                Part::Thread => f.write_str(super::thread_name(thread::current().name()))?,
                Part::Level => write!(f, "{}", record.level())?,
                Part::Location => match (record.file(), record.line()) {
                    (Some(file), Some(line)) => write!(f, "{file}:{line}")?,
                    _ => f.write_str(record.target())?,
                },
                Part::Message => write!(f, "{}", record.args())?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Shown<'a>(&'a LogFormat);

    impl fmt::Display for Shown<'_> {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            let record = Record::builder()
                .args(format_args!("hello"))
                .level(log::Level::Warn)
                .file_static(Some("rtc.rs"))
                .line(Some(7))
                .build();
            self.0.write(f, &record, Duration::from_micros(1_042_317))
        }
    }

    fn shown(text: &str) -> String {
        Shown(&text.parse().unwrap()).to_string()
    }

    #[test]
    fn every_token_stands_for_something_and_the_rest_is_kept() {
        assert_eq!(shown("{boottime}s {level}:{location} -- {msg}"), "  1.042317s WARN:rtc.rs:7 -- hello");
        assert_eq!(shown("{{{level}}} {{}}"), "{WARN} {}");
        assert_eq!(shown("plain"), "plain");
        assert_eq!(shown("{pid}"), std::process::id().to_string());
        assert_eq!(shown("{tid}"), rustix::thread::gettid().to_string());
        let clock = shown("{wallclock}");
        assert!(clock.starts_with("20") && clock.ends_with('Z') && clock.len() == 27, "{clock}");
        let named = thread::Builder::new().name("vcpu3".to_owned());
        assert_eq!(named.spawn(|| shown("<{thread}>")).unwrap().join().unwrap(), "<vcpu3>");
    }

    #[test]
    fn what_is_no_form_is_refused_and_the_message_says_what_to_write() {
        for (text, expected) in [
            ("a {level", FormatError::Open),
            ("a } b", FormatError::Closed),
            ("{colour}", FormatError::Unknown("colour".to_owned())),
            ("{}", FormatError::Unknown(String::new())),
        ] {
            assert_eq!(text.parse::<LogFormat>(), Err(expected), "{text}");
        }
        let message = FormatError::Unknown("colour".to_owned()).to_string();
        assert!(message.starts_with("--log-format has no '{colour}'; it takes {boottime}, "), "{message}");
        assert!(FormatError::Open.to_string().contains("write '{{' for"), "{}", FormatError::Open);
        assert!(FormatError::Closed.to_string().contains("write '}}' for"), "{}", FormatError::Closed);
    }
}

//! The grammar of option values on the command line: `key=value,word,...`.
//!
//! It is Cloud Hypervisor's: brackets and double quotes protect commas, an unknown key is an error, a key
//! that is given twice counts the last time. Values: toggles (`on`, `off`, `true`, `false`), sizes in bytes
//! with `K`, `M` or `G` (binary), lists of integers (`[0,2-4]`), lists of strings, and lists of pairs
//! (`[0@[1-3],1@[4]]`).

use std::path::PathBuf;

use thiserror::Error;

#[cfg(test)]
mod tests;

/// Most integers that a list may spell out, so that a range cannot ask for all memory.
const LIST_MAX: usize = 1 << 16;

/// Why the value of an option cannot be read.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum OptionError {
    /// A key that the option does not have.
    #[error("{option} has no key '{key}'; it takes {accepted}")]
    UnknownKey {
        /// The option, with its dashes.
        option: &'static str,
        /// The key.
        key: String,
        /// The keys that it has.
        accepted: String,
    },
    /// A key without its value.
    #[error("{option}: '{key}' needs a value: write {key}=VALUE")]
    MissingValue {
        /// The option, with its dashes.
        option: &'static str,
        /// The key.
        key: &'static str,
    },
    /// A word with a value.
    #[error("{option}: '{key}' takes no value: write just {key}")]
    UnexpectedValue {
        /// The option, with its dashes.
        option: &'static str,
        /// The word.
        key: &'static str,
    },
    /// A quote or bracket without its partner.
    #[error("{option}: a quote or bracket is not closed in '{text}'; close it, or quote the whole value")]
    Unbalanced {
        /// The option, with its dashes.
        option: &'static str,
        /// The whole value of the option.
        text: String,
    },
    /// A serial port or console that leads nowhere that is known, or to two places.
    #[error("{option}: '{value}' is not possible; give one of off, null, pty, tty, file=PATH, socket=PATH")]
    Mode {
        /// The option, with its dashes.
        option: &'static str,
        /// Its whole value.
        value: String,
    },
    /// Neither a path nor a descriptor, or both.
    #[error(
        "{option}: '{value}' is not possible; give path=PATH, or fd=N for a descriptor that is open already"
    )]
    Endpoint {
        /// The option, with its dashes.
        option: &'static str,
        /// Its whole value.
        value: String,
    },
    /// A value of the wrong form.
    #[error("{option}: '{value}' is no value for {key}; it takes {expected}")]
    InvalidValue {
        /// The option, with its dashes.
        option: &'static str,
        /// The key.
        key: &'static str,
        /// The value.
        value: String,
        /// What it should have been.
        expected: &'static str,
    },
}

/// One thing that may stand between two commas.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Key {
    /// `key=value`.
    Value(&'static str),
    /// A word by itself.
    Word(&'static str),
}

impl Key {
    const fn name(self) -> &'static str {
        match self {
            Self::Value(name) | Self::Word(name) => name,
        }
    }
}

/// The value of one option, taken apart but not yet interpreted.
#[derive(Debug)]
pub struct Options {
    option: &'static str,
    values: Vec<(&'static str, String)>,
}

impl Options {
    /// Takes `text`, the value of `option`, apart. Empty items are skipped.
    pub fn parse(option: &'static str, text: &str, keys: &[Key]) -> Result<Self, OptionError> {
        let items =
            split(text, ',').ok_or_else(|| OptionError::Unbalanced { option, text: text.to_owned() })?;
        let mut values: Vec<(&'static str, String)> = Vec::new();
        for item in items.into_iter().map(str::trim).filter(|item| !item.is_empty()) {
            let (name, value) = match item.split_once('=') {
                Some((name, value)) => (name.trim(), Some(value.trim())),
                None => (item, None),
            };
            let value = match (keys.iter().find(|key| key.name() == name), value) {
                (Some(&Key::Value(key)), Some(value)) => (key, value.to_owned()),
                (Some(&Key::Value(key)), None) => return Err(OptionError::MissingValue { option, key }),
                (Some(&Key::Word(key)), None) => (key, String::new()),
                (Some(&Key::Word(key)), Some(_)) => return Err(OptionError::UnexpectedValue { option, key }),
                (None, _) => {
                    let accepted: Vec<_> = keys.iter().map(|key| key.name()).collect();
                    let accepted = accepted.join(", ");
                    return Err(OptionError::UnknownKey { option, key: name.to_owned(), accepted });
                }
            };
            values.retain(|(key, _)| *key != value.0);
            values.push(value);
        }
        Ok(Self { option, values })
    }

    /// Whether `key` was given.
    pub fn has(&self, key: &str) -> bool {
        self.values.iter().any(|(name, _)| *name == key)
    }

    /// The value of `key`, if it was given.
    pub fn get<T: OptionValue>(&self, key: &str) -> Result<Option<T>, OptionError> {
        let Some((key, value)) = self.values.iter().find(|(name, _)| *name == key) else {
            return Ok(None);
        };
        let error = || OptionError::InvalidValue {
            option: self.option,
            key,
            value: value.clone(),
            expected: T::EXPECTED,
        };
        T::parse(value).map(Some).ok_or_else(error)
    }

    /// The value of `key`, or its type's default.
    pub fn get_or_default<T: OptionValue + Default>(&self, key: &str) -> Result<T, OptionError> {
        Ok(self.get(key)?.unwrap_or_default())
    }

    /// The toggle `key`, or `default` if it was not given.
    pub fn toggle(&self, key: &str, default: bool) -> Result<bool, OptionError> {
        Ok(self.get::<Toggle>(key)?.map_or(default, |toggle| toggle.0))
    }
}

/// What the value of a key can be.
pub trait OptionValue: Sized {
    /// The form, for the message about another one.
    const EXPECTED: &'static str;

    /// Reads the text behind `=`.
    fn parse(text: &str) -> Option<Self>;
}

/// `on`, `off`, `true` or `false`, in any case; empty is off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Toggle(pub bool);

impl OptionValue for Toggle {
    const EXPECTED: &'static str = "on or off";

    fn parse(text: &str) -> Option<Self> {
        match text.to_ascii_lowercase().as_str() {
            "on" | "true" => Some(Self(true)),
            "off" | "false" | "" => Some(Self(false)),
            _ => None,
        }
    }
}

/// A number of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ByteSized(pub u64);

impl OptionValue for ByteSized {
    const EXPECTED: &'static str = "a number of bytes, or one followed by K, M or G";

    fn parse(text: &str) -> Option<Self> {
        let (digits, shift) = match text.as_bytes().last()? {
            b'k' | b'K' => (&text[..text.len() - 1], 10),
            b'm' | b'M' => (&text[..text.len() - 1], 20),
            b'g' | b'G' => (&text[..text.len() - 1], 30),
            _ => (text, 0),
        };
        unsigned(digits)?.checked_mul(1 << shift).map(Self)
    }
}

/// Integers and ranges of them, written out.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct IntegerList(pub Vec<u64>);

impl OptionValue for IntegerList {
    const EXPECTED: &'static str = "a list of integers such as [0,2-4]";

    fn parse(text: &str) -> Option<Self> {
        let mut list = Vec::new();
        for item in items(text)? {
            let (first, last) = item.split_once('-').unwrap_or((item, item));
            let range = unsigned(first.trim())?..=unsigned(last.trim())?;
            let fits = range.end().checked_sub(*range.start())? < LIST_MAX as u64;
            if !fits || list.len() >= LIST_MAX {
                return None;
            }
            list.extend(range);
        }
        Some(Self(list))
    }
}

/// Strings.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StringList(pub Vec<String>);

impl OptionValue for StringList {
    const EXPECTED: &'static str = "a list of strings such as [a,b]";

    fn parse(text: &str) -> Option<Self> {
        Some(Self(items(text)?.into_iter().map(unquote).collect()))
    }
}

/// Pairs written `a@b`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tuples<A, B>(pub Vec<(A, B)>);

impl<A: OptionValue, B: OptionValue> OptionValue for Tuples<A, B> {
    const EXPECTED: &'static str = "a list of pairs such as [0@[1-3],1@[4]]";

    fn parse(text: &str) -> Option<Self> {
        let pair = |item: &str| {
            let (first, second) = item.split_once('@')?;
            Some((A::parse(first.trim())?, B::parse(second.trim())?))
        };
        Some(Self(items(text)?.into_iter().map(pair).collect::<Option<_>>()?))
    }
}

impl OptionValue for String {
    const EXPECTED: &'static str = "a string";

    fn parse(text: &str) -> Option<Self> {
        Some(unquote(text))
    }
}

impl OptionValue for PathBuf {
    const EXPECTED: &'static str = "a path";

    fn parse(text: &str) -> Option<Self> {
        (!text.is_empty()).then(|| unquote(text).into())
    }
}

macro_rules! integer_value {
    ($($type:ty => $expected:literal),*) => {
        $(impl OptionValue for $type {
            const EXPECTED: &'static str = $expected;

            fn parse(text: &str) -> Option<Self> {
                Self::try_from(unsigned(text)?).ok()
            }
        })*
    };
}

integer_value!(
    u8 => "an integer from 0 to 255",
    u16 => "an integer from 0 to 65535",
    u32 => "an integer from 0 to 4294967295",
    u64 => "an integer that is not negative"
);

/// Digits only: the standard parser would let a plus sign through.
fn unsigned(text: &str) -> Option<u64> {
    if text.bytes().all(|byte| byte.is_ascii_digit()) { text.parse().ok() } else { None }
}

/// The items of a list; the brackets around a single one may be left out.
fn items(text: &str) -> Option<Vec<&str>> {
    let inner = match text.strip_prefix('[') {
        Some(rest) => rest.strip_suffix(']')?,
        None => text,
    };
    let items = split(inner, ',')?;
    Some(items.into_iter().map(str::trim).filter(|item| !item.is_empty()).collect())
}

/// Splits at `separator` outside quotes and brackets; `None` if one of those is not closed.
fn split(text: &str, separator: char) -> Option<Vec<&str>> {
    let (mut parts, mut start, mut depth, mut quoted) = (Vec::new(), 0, 0u32, false);
    for (at, c) in text.char_indices() {
        match c {
            '"' => quoted = !quoted,
            '[' if !quoted => depth += 1,
            ']' if !quoted => depth = depth.checked_sub(1)?,
            c if c == separator && depth == 0 && !quoted => {
                parts.push(&text[start..at]);
                start = at + c.len_utf8();
            }
            _ => {}
        }
    }
    parts.push(&text[start..]);
    (depth == 0 && !quoted).then_some(parts)
}

/// Takes the quotes off a quoted string.
fn unquote(text: &str) -> String {
    let inner = text.strip_prefix('"').and_then(|rest| rest.strip_suffix('"'));
    inner.unwrap_or(text).to_owned()
}

//! Open descriptors in a configuration: numbers that this process has inherited, or files that came with a request of the API.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::client::{DescriptorError, own};

/// Descriptors up to this one are standard input, output and error.
const RESERVED: i32 = 2;

/// One of them.
#[derive(Clone, Debug)]
enum Descriptor {
    Number(i32),
    Open(Arc<OwnedFd>),
}

/// A list of open descriptors. In JSON it is a list of -1: a number means nothing to another process, and is not taken from one.
#[derive(Clone, Debug, Default)]
pub struct Descriptors(Vec<Descriptor>);

impl PartialEq for Descriptors {
    fn eq(&self, other: &Self) -> bool {
        self.0.len() == other.0.len()
            && self.0.iter().zip(&other.0).all(|pair| match pair {
                (Descriptor::Number(a), Descriptor::Number(b)) => a == b,
                (Descriptor::Open(a), Descriptor::Open(b)) => Arc::ptr_eq(a, b),
                _ => false,
            })
    }
}

impl Eq for Descriptors {}

impl Descriptors {
    /// Numbers of this process's own.
    pub fn of_numbers(numbers: Vec<i32>) -> Self {
        Self(numbers.into_iter().map(Descriptor::Number).collect())
    }

    /// Files that somebody has handed over.
    pub fn of_files(files: Vec<OwnedFd>) -> Self {
        Self(files.into_iter().map(|file| Descriptor::Open(Arc::new(file))).collect())
    }

    /// How many.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// One that cannot be meant.
    pub fn reserved(&self) -> Option<i32> {
        self.0.iter().find_map(|descriptor| match descriptor {
            Descriptor::Number(number) if *number <= RESERVED => Some(*number),
            _ => None,
        })
    }

    /// The files behind them.
    ///
    /// # Errors
    /// Behind a number there is none.
    pub fn open(&self) -> Result<Vec<Arc<OwnedFd>>, DescriptorError> {
        let open = |descriptor: &Descriptor| match descriptor {
            Descriptor::Number(number) => own(*number).map(Arc::new),
            Descriptor::Open(file) => Ok(Arc::clone(file)),
        };
        self.0.iter().map(open).collect()
    }
}

impl Serialize for Descriptors {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(self.0.iter().map(|_| -1))
    }
}

impl<'de> Deserialize<'de> for Descriptors {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let numbers: Vec<i64> = Vec::deserialize(deserializer)?;
        Ok(Self(numbers.into_iter().map(|_| Descriptor::Number(-1)).collect()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_from_elsewhere_mean_nothing_and_files_are_not_shown() {
        let read: Descriptors = serde_json::from_str("[5,6]").unwrap();
        assert_eq!((read.len(), read.reserved()), (2, Some(-1)));
        let file = || OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
        let files = Descriptors::of_files(vec![file(), file()]);
        assert_eq!(serde_json::to_string(&files).unwrap(), "[-1,-1]");
        assert_eq!((files.reserved(), files.open().unwrap().len()), (None, 2));
        assert_eq!(files, files.clone());
        assert_ne!(files, Descriptors::of_files(vec![file(), file()]));
    }

    #[test]
    fn a_number_without_a_file_behind_it_is_named() {
        let error = Descriptors::of_numbers(vec![999_999]).open().unwrap_err().to_string();
        assert!(error.contains("fd=999999"), "{error}");
    }
}

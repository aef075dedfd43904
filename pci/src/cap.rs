//! Capabilities of a function's configuration space, each as a pure register model.
//!
//! Every model speaks offsets relative to the start of its capability and leaves the first two bytes (capability id and pointer to the next
//! one) to whoever owns the list: a read does not touch them, a write to them is dropped. A read fills only the bytes
//! the model owns, so a caller lays it over bytes from elsewhere. Lengths are the `LEN` (MSI: `capability_len()`) of each model.

pub mod msi;
pub mod msix;
pub mod pcie;
pub mod pm;
mod slot;
pub mod vectors;

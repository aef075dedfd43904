//! The device behind rings of every form.

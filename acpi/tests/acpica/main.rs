//! The generated tables in the hands of the reference implementation, ACPICA: its compiler and disassembler (`iasl`) and its
//! interpreter in user space (`acpiexec`). Debian has both in the package `acpica-tools`.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on may panic")]

mod compile;
mod golden;
mod memory;
mod power;
mod processors;
mod sample;
mod segments;
mod tools;

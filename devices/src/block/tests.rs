//! Images of both forms against a model, and against `qemu-img`.

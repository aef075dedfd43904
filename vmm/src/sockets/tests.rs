//! Sockets by path and by descriptor.

//! A client of the host that has not yet said which port of the guest it wants: `CONNECT <port>\n`.

use std::io::{self, Read};
use std::os::unix::net::UnixStream;

/// The longest line: the word, ten digits, and some white space.
const LINE_MAX: usize = 32;

/// A client and what it has said.
#[derive(Debug)]
pub struct Greeting {
    /// The client.
    pub stream: UnixStream,
    line: Vec<u8>,
}

/// What has come of reading on.
#[derive(Debug, PartialEq, Eq)]
pub enum Heard {
    /// The line is not complete.
    More,
    /// It wants this port.
    Port(u32),
    /// It has gone, or says something else.
    Useless,
}

impl Greeting {
    /// A client that has said nothing.
    pub fn new(stream: UnixStream) -> Self {
        Self { stream, line: Vec::new() }
    }

    /// Reads on to the end of the line, and no byte of what follows: that is for the guest.
    pub fn read(&mut self) -> Heard {
        let mut byte = [0];
        loop {
            match self.stream.read(&mut byte) {
                Ok(1) if byte == *b"\n" => return parse(&self.line).map_or(Heard::Useless, Heard::Port),
                Ok(1) if self.line.len() < LINE_MAX => self.line.extend_from_slice(&byte),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Heard::More,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                _ => return Heard::Useless,
            }
        }
    }
}

fn parse(line: &[u8]) -> Option<u32> {
    let mut words = str::from_utf8(line).ok()?.split_ascii_whitespace();
    let is_connect = words.next()?.eq_ignore_ascii_case("connect");
    let digits = words.next().filter(|word| word.bytes().all(|byte| byte.is_ascii_digit()))?;
    (is_connect && words.next().is_none()).then_some(())?;
    digits.parse().ok()
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn heard(text: &[u8]) -> (Heard, Greeting) {
        let (mut client, stream) = UnixStream::pair().unwrap();
        stream.set_nonblocking(true).unwrap();
        client.write_all(text).unwrap();
        let mut greeting = Greeting::new(stream);
        // The client stays as long as the greeting is looked at.
        let result = greeting.read();
        drop(client);
        (result, greeting)
    }

    #[test]
    fn a_line_names_the_port_and_what_follows_it_is_left() {
        for (text, port) in [("CONNECT 52\n", 52), ("connect  4294967295 \r\n", u32::MAX)] {
            assert_eq!(heard(text.as_bytes()).0, Heard::Port(port), "{text}");
        }
        let (result, mut greeting) = heard(b"CONNECT 1\nhello");
        assert_eq!(result, Heard::Port(1));
        let mut rest = String::new();
        greeting.stream.read_to_string(&mut rest).unwrap();
        assert_eq!(rest, "hello");
    }

    #[test]
    fn everything_else_is_useless_or_not_complete() {
        for text in [
            "\n",
            "CONNECT\n",
            "CONNECT x\n",
            "CONNECT -1\n",
            "CONNECT +1\n",
            "CONNECT 4294967296\n",
            "CONNECT 1 2\n",
            "GET / HTTP/1.1\n",
            "\u{e9}\n",
            &"x".repeat(LINE_MAX + 1),
        ] {
            assert_eq!(heard(text.as_bytes()).0, Heard::Useless, "{text:?}");
        }
        assert_eq!(heard(b"\xff\xfe\n").0, Heard::Useless);
        assert_eq!(heard(b"CONNECT 5").0, Heard::More);
        let (client, stream) = UnixStream::pair().unwrap();
        drop(client);
        assert_eq!(Greeting::new(stream).read(), Heard::Useless);
    }
}

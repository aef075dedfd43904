//! Requests as bytes, and replies out of bytes: HTTP/1.1 (RFC 9112), of which the API uses little.
//!
//! The head of a reply is taken apart by `httparse`. Its body is as long as `Content-Length` says, or reaches to the end of the connection
//! (RFC 9112, section 6.3). A chunked body is refused: no VMM sends one.

/// What precedes the name of a call.
const BASE: &str = "/api/v1/";
/// Most header fields of a reply.
const HEADERS_MAX: usize = 64;
/// Longest head of a reply; something that is longer is no API.
const HEAD_MAX: usize = 64 << 10;
/// Longest body of a reply.
const BODY_MAX: usize = 64 << 20;

/// What is done to the target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// Read it.
    Get,
    /// Everything else.
    Put,
}

/// One request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// What is done.
    pub method: Method,
    /// To what: a path.
    pub target: String,
    /// JSON, if there is any.
    pub body: Option<String>,
    /// The form that the reply is to have.
    pub accept: &'static str,
}

/// Any form will do.
const ANYTHING: &str = "*/*";

impl Request {
    /// Reads `target`.
    pub fn get(target: impl Into<String>) -> Self {
        Self { method: Method::Get, target: target.into(), body: None, accept: ANYTHING }
    }

    /// A call of the v1 API that reads, such as `vm.info`.
    pub fn api_get(call: &str) -> Self {
        Self::get(format!("{BASE}{call}"))
    }

    /// A call of the v1 API that does something, such as `vm.boot`.
    pub fn api_put(call: &str, body: Option<String>) -> Self {
        Self { method: Method::Put, target: format!("{BASE}{call}"), body, accept: ANYTHING }
    }

    /// The same request for a reply in another form.
    pub fn accepting(self, accept: &'static str) -> Self {
        Self { accept, ..self }
    }

    /// The name of the call, for messages.
    pub fn call(&self) -> &str {
        self.target.strip_prefix(BASE).unwrap_or(&self.target)
    }

    pub(super) fn bytes(&self) -> Vec<u8> {
        let method = match self.method {
            Method::Get => "GET",
            Method::Put => "PUT",
        };
        let Self { target, accept, .. } = self;
        let mut text = format!("{method} {target} HTTP/1.1\r\nHost: localhost\r\nAccept: {accept}\r\n");
        match &self.body {
            Some(body) => {
                let length = body.len();
                text.push_str(&format!("Content-Type: application/json\r\nContent-Length: {length}\r\n\r\n"));
                text.push_str(body);
            }
            // Cloud Hypervisor refuses a body where it wants none; a length of 0 is no body to it.
            None if self.method == Method::Put => text.push_str("Content-Length: 0\r\n\r\n"),
            None => text.push_str("\r\n"),
        }
        text.into_bytes()
    }
}

/// The answer to a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reply {
    /// The status code.
    pub status: u16,
    /// The body; empty if there was none.
    pub body: Vec<u8>,
}

impl Reply {
    /// Whether what was asked for has been done.
    pub fn is_success(&self) -> bool {
        (200..300).contains(&self.status)
    }

    /// The body as text.
    pub fn text(&self) -> std::borrow::Cow<'_, str> {
        String::from_utf8_lossy(&self.body)
    }
}

/// The head of a reply.
#[derive(Debug)]
struct Head {
    status: u16,
    /// Where the body begins.
    length: usize,
    body: BodyLength,
}

#[derive(Clone, Copy, Debug)]
enum BodyLength {
    Known(usize),
    ToTheEnd,
}

/// Takes a reply apart as it arrives.
#[derive(Debug, Default)]
pub(super) struct Parser {
    bytes: Vec<u8>,
    head: Option<Head>,
}

impl Parser {
    pub fn add(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// The reply, if all of it is there.
    pub fn reply(&mut self) -> Result<Option<Reply>, String> {
        while self.head.is_none() {
            let Some(head) = parse_head(&self.bytes)? else { return Ok(None) };
            self.bytes.drain(..head.length);
            // 100 Continue and its like precede the reply proper.
            if head.status >= 200 {
                self.head = Some(head);
            }
        }
        match &self.head {
            Some(Head { status, body: BodyLength::Known(length), .. }) if self.bytes.len() >= *length => {
                Ok(Some(Reply { status: *status, body: self.bytes[..*length].to_vec() }))
            }
            _ if self.bytes.len() > BODY_MAX => Err(format!("its body is longer than {BODY_MAX} bytes")),
            _ => Ok(None),
        }
    }

    /// The reply, when nothing more will come; `None` if it is cut off.
    pub fn end(&mut self) -> Result<Option<Reply>, String> {
        Ok(match self.reply()? {
            None => match &self.head {
                Some(Head { status, body: BodyLength::ToTheEnd, .. }) => {
                    Some(Reply { status: *status, body: std::mem::take(&mut self.bytes) })
                }
                _ => None,
            },
            reply => reply,
        })
    }
}

/// The head at the beginning of `bytes`, if all of it is there.
fn parse_head(bytes: &[u8]) -> Result<Option<Head>, String> {
    let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
    let mut response = httparse::Response::new(&mut headers);
    let length = match response.parse(bytes) {
        Ok(httparse::Status::Complete(length)) => length,
        Ok(httparse::Status::Partial) if bytes.len() > HEAD_MAX => {
            return Err(format!("its head is longer than {HEAD_MAX} bytes"));
        }
        Ok(httparse::Status::Partial) => return Ok(None),
        Err(error) => return Err(format!("it is no HTTP: {error}")),
    };
    let status = response.code.unwrap_or_default();
    let field = |name: &str| {
        let mut fields = response.headers.iter();
        fields.find(|field| field.name.eq_ignore_ascii_case(name)).map(|field| field.value)
    };
    if field("Transfer-Encoding").is_some() {
        return Err("it has a Transfer-Encoding, which this API does not use".to_owned());
    }
    let body = match field("Content-Length") {
        _ if status < 200 || status == 204 || status == 304 => BodyLength::Known(0),
        None => BodyLength::ToTheEnd,
        Some(value) => {
            let text = String::from_utf8_lossy(value);
            match text.trim().parse() {
                Ok(length) if length <= BODY_MAX => BodyLength::Known(length),
                _ => return Err(format!("its Content-Length is '{text}'")),
            }
        }
    };
    Ok(Some(Head { status, length, body }))
}

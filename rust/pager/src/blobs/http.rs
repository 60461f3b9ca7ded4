//! Blobs below a URL, by range requests: a peer's directory, or object storage behind a gateway.
//!
//! One request for each run of bytes, on connections that are kept. What a server answers has to be
//! exactly the range that was asked for, of a blob of the size that it had when it was opened. What
//! may pass (no connection, no answer, an overloaded server, a body that breaks off) is asked for
//! again from where it broke off, a few times, ever later, within one bound for the whole read;
//! nothing else is.

use std::fmt;
use std::io::{self, IoSliceMut, Read};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use ureq::http::{header, HeaderMap, Response, Uri};
use ureq::{Agent, Body, BodyReader, Timeout};

use super::{Blob, BlobError, BlobSource, Medium, Opened};

const HTTP: Medium = Medium {
    name: "http",
    window_bytes: 4 << 20,
    parallel: 28,
};
/// What a look at a blob brings besides its size: all of a small one.
const HEAD_BYTES: u64 = 4096;
/// The most of a blob's end that comes with its size: the table of a build of nearly 8 GiB. A
/// larger one is asked for by itself.
const END_BYTES_MAX: u64 = 4 << 20;
/// Of each connection that is kept.
const INPUT_BYTES: usize = 64 << 10;
const OUTPUT_BYTES: usize = 4 << 10;
const RESPONSE_HEAD_BYTES: usize = 16 << 10;

/// Bounds on a read.
#[derive(Debug, Clone, Copy)]
pub struct HttpLimits {
    /// To have a connection.
    pub connect: Duration,
    /// From the request to the end of the answer's head.
    pub response: Duration,
    /// Between any two pieces of an answer.
    pub silence: Duration,
    /// One request, from its connection to the end of its body.
    pub request: Duration,
    /// One read, with all its requests and the pauses between them.
    pub total: Duration,
    /// Requests of one read.
    pub requests: u32,
    /// The first pause; each is twice the one before.
    pub pause: Duration,
}

impl Default for HttpLimits {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(2),
            response: Duration::from_secs(4),
            silence: Duration::from_secs(2),
            request: Duration::from_secs(8),
            total: Duration::from_secs(12),
            requests: 5,
            pause: Duration::from_millis(50),
        }
    }
}

/// What can go wrong with a request; each is its own.
#[derive(Debug, PartialEq, Eq)]
enum Fault {
    /// No connection, or it broke off.
    Unreachable(String),
    /// Nothing came within the bound of this part.
    Silent(Timeout),
    /// A status that brings no bytes.
    Status(u16),
    /// All of the blob instead of the range.
    IgnoresRange,
    /// Another range than was asked for, or none that can be read.
    WrongRange(String),
    /// A blob of another size than it had.
    OtherSize(u64),
    /// Bytes that are not the blob's but an encoding of them.
    Encoded,
    /// A body that is longer than its range.
    Longer,
    /// A body that ends before its range does.
    Shorter,
}

impl fmt::Display for Fault {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unreachable(cause) => write!(to, "the server can't be reached: {cause}"),
            Self::Silent(part) => write!(to, "the server does not answer in time ({part})"),
            Self::Status(status) => write!(to, "the server answers with status {status}"),
            Self::IgnoresRange => write!(to, "the server ignores ranges"),
            Self::WrongRange(range) => write!(to, "the server answers with range {range:?}"),
            Self::OtherSize(size) => write!(to, "it has {size} bytes now"),
            Self::Encoded => write!(to, "the server encodes what it sends"),
            Self::Longer => write!(to, "the server sends more than its range"),
            Self::Shorter => write!(to, "the server sends less than its range"),
        }
    }
}

impl Fault {
    /// Whether it may pass.
    fn may_pass(&self) -> bool {
        match self {
            Self::Unreachable(_) | Self::Silent(_) | Self::Shorter => true,
            Self::Status(status) => matches!(status, 408 | 425 | 429 | 500 | 502..=504),
            _ => false,
        }
    }
}

impl From<Fault> for BlobError {
    fn from(fault: Fault) -> Self {
        match fault {
            Fault::Status(404 | 410) => Self::Missing,
            other => Self::Unavailable(other.to_string()),
        }
    }
}

impl From<ureq::Error> for Fault {
    fn from(error: ureq::Error) -> Self {
        match error {
            ureq::Error::Timeout(part) => Self::Silent(part),
            other => Self::Unreachable(other.to_string()),
        }
    }
}

impl From<io::Error> for Fault {
    /// Of a body that is being read.
    fn from(error: io::Error) -> Self {
        match (error.kind(), ureq::Error::from(error)) {
            (io::ErrorKind::UnexpectedEof, _) => Self::Shorter,
            (_, ureq::Error::Timeout(part)) => Self::Silent(part),
            (_, error) => Self::Unreachable(error.to_string()),
        }
    }
}

/// Blobs below a URL.
#[derive(Debug)]
pub struct HttpSource {
    base: String,
    agent: Agent,
    limits: HttpLimits,
    /// Whether the server was seen not to know ranges that count from the end.
    from_start_only: AtomicBool,
}

#[derive(Debug)]
struct HttpBlob {
    url: String,
    agent: Agent,
    limits: HttpLimits,
    size_bytes: u64,
    head: Vec<u8>,
}

/// A blob's size, and bytes of it that came with that.
enum Look {
    Head(u64, Vec<u8>),
    End(u64, Vec<u8>),
}

impl HttpSource {
    /// Blobs at `url`, a slash and their names.
    ///
    /// # Errors
    /// In words, where the URL is none of a kind that can be read.
    pub fn new(url: &str, limits: HttpLimits) -> Result<Self, String> {
        let wrong = |cause: &dyn fmt::Display| format!("{url:?} can't be read from: {cause}");
        let parsed: Uri = url.parse().map_err(|error| wrong(&error))?;
        if parsed.scheme_str() != Some("http") || parsed.host().unwrap_or_default().is_empty() {
            return Err(wrong(&"it is not of the form http://HOST[:PORT]/PATH"));
        }
        if parsed.query().is_some() {
            return Err(wrong(&"a name can't be put behind a query"));
        }
        let config = Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            // Whatever the environment says: these are bytes of this installation's own.
            .proxy(None)
            .user_agent(concat!("diapause-pager/", env!("CARGO_PKG_VERSION")))
            .accept_encoding("identity")
            .max_response_header_size(RESPONSE_HEAD_BYTES)
            .input_buffer_size(INPUT_BYTES)
            .output_buffer_size(OUTPUT_BYTES)
            .max_idle_connections(HTTP.parallel)
            .max_idle_connections_per_host(HTTP.parallel)
            .timeout_resolve(Some(limits.connect))
            .timeout_connect(Some(limits.connect))
            .timeout_recv_response(Some(limits.response))
            .timeout_per_read(Some(limits.silence))
            .timeout_per_write(Some(limits.silence));
        Ok(Self {
            base: url.trim_end_matches('/').to_owned(),
            agent: config.build().new_agent(),
            limits,
            from_start_only: AtomicBool::new(false),
        })
    }

    /// A blob's size with its last bytes or, of a server that can't count from the end, with its
    /// first.
    fn look(&self, blob: &HttpBlob, end_bytes: u64, tries: &Tries) -> Result<Look, Fault> {
        let asked = (1..=END_BYTES_MAX).contains(&end_bytes);
        if asked && !self.from_start_only.load(Ordering::Relaxed) {
            if let Some(look) = blob.ask_end(end_bytes, tries)? {
                return Ok(look);
            }
            self.from_start_only.store(true, Ordering::Relaxed);
        }
        blob.ask_head(tries)
    }
}

impl BlobSource for HttpSource {
    fn open_with_end(&self, name: &str, end_bytes: u64) -> Result<Opened, BlobError> {
        let mut blob = HttpBlob {
            url: format!("{}/{name}", self.base),
            agent: self.agent.clone(),
            limits: self.limits,
            size_bytes: 0,
            head: Vec::new(),
        };
        let mut tries = Tries::new(&self.limits);
        let (size_bytes, head, end) = loop {
            match self.look(&blob, end_bytes, &tries) {
                Ok(Look::Head(size_bytes, head)) => break (size_bytes, head, Vec::new()),
                Ok(Look::End(size_bytes, end)) => break (size_bytes, Vec::new(), end),
                Err(fault) => tries.again(fault)?,
            }
        };
        (blob.size_bytes, blob.head) = (size_bytes, head);
        let blob = Box::new(blob);
        Ok(Opened { blob, end })
    }

    fn medium(&self) -> Medium {
        HTTP
    }
}

impl Blob for HttpBlob {
    fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    fn medium(&self) -> Medium {
        HTTP
    }

    fn read_into(&self, offset: u64, into: &mut [IoSliceMut<'_>]) -> Result<(), BlobError> {
        let length = into.iter().map(|part| part.len() as u64).sum();
        let mut stream = self.stream(offset, length)?;
        for part in into {
            stream.read_exact(part)?;
        }
        Ok(())
    }

    fn stream(&self, offset: u64, length: u64) -> Result<Box<dyn Read + '_>, BlobError> {
        let end = offset.checked_add(length);
        let end = end
            .filter(|end| *end <= self.size_bytes)
            .ok_or(BlobError::Short)?;
        if end <= self.head.len() as u64 {
            return Ok(Box::new(&self.head[offset as usize..end as usize]));
        }
        Ok(Box::new(Stream {
            blob: self,
            at: offset,
            end,
            body: None,
            tries: Tries::new(&self.limits),
        }))
    }
}

impl HttpBlob {
    /// Asks for a range.
    fn ask(&self, range: &str, tries: &Tries) -> Result<Response<Body>, Fault> {
        let request = self
            .agent
            .get(&self.url)
            .header(header::RANGE, format!("bytes={range}"))
            .config()
            .timeout_global(Some(tries.left()))
            .build();
        let response = request.call()?;
        let encoding = response.headers().get(header::CONTENT_ENCODING);
        match response.status().as_u16() {
            200 | 206 if encoding.is_some_and(|encoding| encoding != "identity") => {
                Err(Fault::Encoded)
            }
            200 | 206 | 416 => Ok(response),
            status => Err(Fault::Status(status)),
        }
    }

    /// The size of the blob and its last bytes; None where the server does not count from the end.
    fn ask_end(&self, bytes: u64, tries: &Tries) -> Result<Option<Look>, Fault> {
        let response = match self.ask(&format!("-{bytes}"), tries) {
            Err(Fault::Status(400 | 501)) => return Ok(None),
            other => other?,
        };
        let range = content_range(response.headers());
        let length = response.body().content_length();
        let (size, mut end) = match (response.status().as_u16(), range, length) {
            (206, Ok((start, end, size)), _) if end == size && end - start == size.min(bytes) => {
                (size, vec![0; (end - start) as usize])
            }
            // All of it is its end: to ignore the range is as good as to heed it.
            (200, _, Some(size)) if size <= bytes => (size, vec![0; size as usize]),
            (416, Err(range), _) if range == "bytes */0" => {
                return Ok(Some(Look::End(0, Vec::new())))
            }
            (200 | 416, ..) | (206, Ok(_), _) => return Ok(None),
            (206, range, _) => return Err(wrong_range(range)),
            (status, ..) => return Err(Fault::Status(status)),
        };
        self.fill(response, &mut end)?;
        Ok(Some(Look::End(size, end)))
    }

    /// The size of the blob and its first bytes.
    fn ask_head(&self, tries: &Tries) -> Result<Look, Fault> {
        let response = self.ask(&format!("0-{}", HEAD_BYTES - 1), tries)?;
        let range = content_range(response.headers());
        let length = response.body().content_length();
        let (size, mut head) = match (response.status().as_u16(), range, length) {
            (206, Ok((0, end, size)), _) if end == size.min(HEAD_BYTES) => {
                (size, vec![0; end as usize])
            }
            // The range covers it all: to ignore it is as good as to heed it.
            (200, _, Some(size)) if size <= HEAD_BYTES => (size, vec![0; size as usize]),
            (200, ..) => return Err(Fault::IgnoresRange),
            (416, Err(range), _) if range == "bytes */0" => return Ok(Look::Head(0, Vec::new())),
            (206, range, _) => return Err(wrong_range(range)),
            (status, ..) => return Err(Fault::Status(status)),
        };
        self.fill(response, &mut head)?;
        Ok(Look::Head(size, head))
    }

    /// All of a body, which has the length of `into`.
    fn fill(&self, response: Response<Body>, into: &mut [u8]) -> Result<(), Fault> {
        let mut body = self.body(response, into.len() as u64)?;
        body.read_exact(into)?;
        at_end(&mut body)
    }

    /// The bytes `start..end`, to be read.
    fn ask_range(&self, start: u64, end: u64, tries: &Tries) -> Result<BodyReader<'static>, Fault> {
        let response = self.ask(&format!("{start}-{}", end - 1), tries)?;
        let range = content_range(response.headers());
        match (response.status().as_u16(), range) {
            (206, Ok((from, to, size))) if (from, to) == (start, end) => {
                if size != self.size_bytes {
                    return Err(Fault::OtherSize(size));
                }
            }
            (206, range) => return Err(wrong_range(range)),
            (200, _) if (start, end) == (0, self.size_bytes) => {}
            (200, _) => return Err(Fault::IgnoresRange),
            (status, _) => return Err(Fault::Status(status)),
        }
        self.body(response, end - start)
    }

    /// The body of an answer that has to be of so many bytes.
    fn body(&self, response: Response<Body>, length: u64) -> Result<BodyReader<'static>, Fault> {
        match response.body().content_length() {
            Some(said) if said > length => Err(Fault::Longer),
            Some(said) if said < length => Err(Fault::Shorter),
            _ => Ok(response.into_body().into_reader()),
        }
    }
}

/// What an answer says of its range: first byte, the byte after its last, and the blob's size; or
/// what it says that can't be understood.
fn content_range(headers: &HeaderMap) -> Result<(u64, u64, u64), String> {
    let text = headers.get(header::CONTENT_RANGE);
    let text = text.map(|text| text.to_str().unwrap_or("?"));
    let text = text.unwrap_or_default();
    let parsed = || {
        let (range, size) = text.strip_prefix("bytes ")?.split_once('/')?;
        let (first, last) = range.split_once('-')?;
        let (first, last): (u64, u64) = (first.parse().ok()?, last.parse().ok()?);
        let size: u64 = size.parse().ok()?;
        (first <= last && last < size).then_some((first, last + 1, size))
    };
    parsed().ok_or_else(|| text.to_owned())
}

fn wrong_range(range: Result<(u64, u64, u64), String>) -> Fault {
    Fault::WrongRange(match range {
        Ok((first, end, size)) => format!("bytes {first}-{}/{size}", end - 1),
        Err(text) => text,
    })
}

/// That a body has nothing more; the connection can be used again then.
fn at_end(body: &mut BodyReader<'_>) -> Result<(), Fault> {
    match body.read(&mut [0])? {
        0 => Ok(()),
        _ => Err(Fault::Longer),
    }
}

/// How often and how long one read may still ask.
struct Tries {
    until: Instant,
    request: Duration,
    left: u32,
    pause: Duration,
}

impl Tries {
    fn new(limits: &HttpLimits) -> Self {
        Self {
            until: Instant::now() + limits.total,
            request: limits.request,
            left: limits.requests,
            pause: limits.pause,
        }
    }

    /// The bound of the next request.
    fn left(&self) -> Duration {
        let left = self.until.saturating_duration_since(Instant::now());
        // A bound of nothing would be none.
        left.min(self.request).max(Duration::from_millis(1))
    }

    /// Waits before another request; fails where there is to be none.
    fn again(&mut self, fault: Fault) -> Result<(), BlobError> {
        self.left = self.left.saturating_sub(1);
        let left = self.until.saturating_duration_since(Instant::now());
        if !fault.may_pass() || self.left == 0 || left <= self.pause {
            return Err(fault.into());
        }
        thread::sleep(self.pause);
        self.pause *= 2;
        Ok(())
    }
}

/// The bytes `at..end` of a blob, asked for again from `at` on where they break off.
struct Stream<'a> {
    blob: &'a HttpBlob,
    at: u64,
    end: u64,
    body: Option<BodyReader<'static>>,
    tries: Tries,
}

impl Stream<'_> {
    fn next(&mut self, into: &mut [u8]) -> Result<usize, Fault> {
        let mut body = match self.body.take() {
            Some(body) => body,
            None => self.blob.ask_range(self.at, self.end, &self.tries)?,
        };
        let left = usize::try_from(self.end - self.at).unwrap_or(usize::MAX);
        let wanted = into.len().min(left);
        let read = body.read(&mut into[..wanted])?;
        if read == 0 {
            return Err(Fault::Shorter);
        }
        self.at += read as u64;
        if self.at == self.end {
            at_end(&mut body)?;
        } else {
            self.body = Some(body);
        }
        Ok(read)
    }
}

impl Read for Stream<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        if self.at == self.end || into.is_empty() {
            return Ok(0);
        }
        loop {
            let before = self.at;
            match self.next(into) {
                Ok(read) => return Ok(read),
                // The last byte is there, but not the end: what was read can't be taken back.
                Err(fault) if self.at > before => return Err(BlobError::from(fault).into()),
                Err(fault) => self.tries.again(fault)?,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_urls_that_a_name_can_be_put_behind_are_taken() {
        for url in ["http://a", "http://a:80/", "http://[::1]:9/b/c"] {
            HttpSource::new(url, HttpLimits::default()).unwrap();
        }
        for url in [
            "",
            "a/b",
            "https://a/",
            "ftp://a/",
            "http://",
            "http://a/?b",
            "http://a b",
        ] {
            let error = HttpSource::new(url, HttpLimits::default()).unwrap_err();
            assert!(error.contains("can't be read from"), "{error}");
        }
    }

    #[test]
    fn ranges_are_taken_as_servers_write_them_and_nothing_else() {
        let range = |text: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::CONTENT_RANGE, text.parse().unwrap());
            content_range(&headers)
        };
        assert_eq!(range("bytes 0-0/1"), Ok((0, 1, 1)));
        assert_eq!(range("bytes 5-9/100"), Ok((5, 10, 100)));
        for wrong in [
            "",
            "bytes */9",
            "bytes 5-4/9",
            "bytes 0-9/9",
            "bytes 1-2/*",
            "pages 1-2/3",
        ] {
            assert_eq!(range(wrong), Err(wrong.to_owned()));
        }
        assert_eq!(content_range(&HeaderMap::new()), Err(String::new()));
    }
}

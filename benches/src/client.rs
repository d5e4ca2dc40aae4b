//! The load generator as a client: one keep-alive HTTP connection, and what it makes of the answers.
//!
//! Invariants: an answer counts as one only if it has the form that its route promises; a stream that ends without
//! `[DONE]`, however cleanly, is a failure. Bodies are read up to a limit.
//!
//! It refuses to know when requests leave and what is done with what they took.

use std::path::Path;
use std::sync::Arc;

use anyhow::Context;
use butterfly_engine::clock::Clock;
use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::client::conn::http1::{self, SendRequest};
use hyper::header::HeaderValue;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::TcpStream;

use crate::load::Server;
use crate::record::{Answered, Piece};
use crate::workload::{Ask, Kind, Recipe};

/// The environment variable that holds the API key.
pub(crate) const KEY_VARIABLE: &str = "BUTTERFLY_API_KEY";
/// Bytes of one answer at most.
const BODY_BYTES_MAX: usize = 64 << 20;
/// Bytes of one event of a stream at most.
const EVENT_BYTES_MAX: usize = 1 << 20;

/// A gateway, and as whom it is asked.
#[derive(Debug, Clone)]
pub(crate) struct Gateway {
    /// `host:port`.
    authority: Arc<str>,
    key: Option<HeaderValue>,
}

/// A connection, reopened when the server closes it.
pub(crate) struct Client {
    gateway: Gateway,
    sender: Option<SendRequest<Full<Bytes>>>,
}

/// A client that sends what a recipe says.
pub(crate) struct Asker {
    pub(crate) client: Client,
    pub(crate) recipe: Arc<Recipe>,
    pub(crate) clock: Arc<dyn Clock>,
}

impl Gateway {
    /// `http://HOST:PORT`, with the API key of the environment or of a file, if there is one.
    pub(crate) fn new(url: &str, key_file: Option<&Path>) -> anyhow::Result<Self> {
        anyhow::ensure!(
            !url.starts_with("https:"),
            "--url {url}: TLS is not spoken here; measure beside the gateway, over http"
        );
        let authority = url.strip_prefix("http://").unwrap_or(url).trim_end_matches('/');
        let port = authority.rsplit_once(':').and_then(|(host, port)| (!host.is_empty()).then_some(port));
        let is_address = port.is_some_and(|port| port.parse::<u16>().is_ok()) && !authority.contains('/');
        anyhow::ensure!(is_address, "--url {url}: expected http://HOST:PORT");
        let key = match key_file {
            Some(file) => Some(std::fs::read_to_string(file).with_context(|| format!("reading {}", file.display()))?),
            None => std::env::var(KEY_VARIABLE).ok(),
        };
        let key = key.as_deref().map(str::trim).filter(|key| !key.is_empty());
        let header = |key| {
            let mut value = HeaderValue::try_from(format!("Bearer {key}")).context("the API key is no header value")?;
            value.set_sensitive(true);
            anyhow::Ok(value)
        };
        Ok(Self { authority: authority.into(), key: key.map(header).transpose()? })
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.authority)
    }

    pub(crate) fn client(&self) -> Client {
        Client { gateway: self.clone(), sender: None }
    }
}

impl Client {
    /// Sends a request and returns the head of its response.
    async fn send(&mut self, method: &str, path: &str, body: Bytes) -> anyhow::Result<Response<Incoming>> {
        let mut sender = match self.sender.take() {
            Some(sender) if !sender.is_closed() => sender,
            _ => self.connect().await?,
        };
        sender.ready().await.context("the connection was closed")?;
        let mut request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", &*self.gateway.authority)
            .header("content-type", "application/json");
        if let Some(key) = &self.gateway.key {
            request = request.header("authorization", key);
        }
        let response = sender.send_request(request.body(Full::new(body))?).await?;
        self.sender = Some(sender);
        Ok(response)
    }

    /// Sends a request and reads the whole response: status and body.
    pub(crate) async fn call(&mut self, method: &str, path: &str, body: Bytes) -> anyhow::Result<(u16, Bytes)> {
        let response = self.send(method, path, body).await?;
        let status = response.status().as_u16();
        Ok((status, read(response).await?))
    }

    /// Starts a stream, reads events with tokens until there were `tokens`, and hangs up. Returns the status.
    pub(crate) async fn hang_up_after(&mut self, path: &str, body: Bytes, tokens: u32) -> anyhow::Result<u16> {
        let mut body = self.send("POST", path, body).await?;
        let status = body.status().as_u16();
        let mut events = Events::default();
        let mut seen = 0;
        while seen < tokens
            && let Some(frame) = body.frame().await
        {
            let Ok(data) = frame?.into_data() else { continue };
            events.push(&data)?;
            while let Some(event) = events.next() {
                seen += u32::from(event.starts_with(b"data: {"));
            }
        }
        // Without its sender and its body the connection closes, which is how a client cancels.
        self.sender = None;
        Ok(status)
    }

    async fn connect(&self) -> anyhow::Result<SendRequest<Full<Bytes>>> {
        let authority = &*self.gateway.authority;
        let stream = TcpStream::connect(authority).await.with_context(|| format!("connecting to {authority}"))?;
        stream.set_nodelay(true)?;
        let (sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
        tokio::spawn(async move {
            // How a connection ended shows in the requests that were on it.
            let _ = connection.await;
        });
        Ok(sender)
    }
}

async fn read(response: Response<Incoming>) -> anyhow::Result<Bytes> {
    let body = Limited::new(response.into_body(), BODY_BYTES_MAX).collect().await;
    Ok(body.map_err(|error| anyhow::anyhow!("reading the response: {error}"))?.to_bytes())
}

impl Server for Asker {
    async fn answer(&mut self, ask: &Ask) -> Answered {
        let mut answered = Answered::default();
        if let Err(error) = self.ask(ask, &mut answered).await {
            let code = if answered.status == 0 { "no_response" } else { "broken_response" };
            answered.fails(code, format!("{error:#}"));
        }
        answered
    }
}

impl Asker {
    async fn ask(&mut self, ask: &Ask, answered: &mut Answered) -> anyhow::Result<()> {
        let response = self.client.send("POST", ask.kind.path(), self.recipe.body(ask)).await?;
        answered.status = response.status().as_u16();
        if answered.status != 200 {
            let body: Value = serde_json::from_slice(&read(response).await?).unwrap_or_default();
            let code = body["error"]["code"].as_str().map_or_else(|| answered.status.to_string(), str::to_owned);
            answered.fails(code, body["error"]["message"].as_str().unwrap_or("an answer without a message"));
            return Ok(());
        }
        if ask.kind == Kind::Stream {
            return self.stream(response, answered).await;
        }
        let body: Value = serde_json::from_slice(&read(response).await?)?;
        anyhow::ensure!(body["error"].is_null(), "status 200 with an error in it: {}", body["error"]);
        note(&body, answered);
        let is_whole = match ask.kind {
            Kind::Embedding => body["data"].as_array().is_some_and(|data| data.len() == 1),
            _ => answered.receipt.is_some(),
        };
        anyhow::ensure!(is_whole, "status 200, and no receipt or no data in it");
        Ok(())
    }

    async fn stream(&self, response: Response<Incoming>, answered: &mut Answered) -> anyhow::Result<()> {
        let mut body = response.into_body();
        let mut events = Events::default();
        let mut counted = 0;
        let mut is_complete = false;
        while let Some(frame) = body.frame().await {
            let Ok(data) = frame?.into_data() else { continue };
            events.push(&data)?;
            while let Some(event) = events.next() {
                let Some(data) = event.strip_prefix(b"data: ") else { continue };
                if data.trim_ascii_end() == b"[DONE]" {
                    is_complete = true;
                    continue;
                }
                let chunk: Value = serde_json::from_slice(data)?;
                anyhow::ensure!(chunk["error"].is_null(), "the stream failed: {}", chunk["error"]);
                note(&chunk, answered);
                if let Some(tokens) = tokens_of(&chunk, answered) {
                    answered.pieces.push(Piece { at: self.clock.now(), tokens });
                    counted += u64::from(tokens);
                }
            }
        }
        anyhow::ensure!(is_complete, "the stream ended without [DONE]");
        anyhow::ensure!(answered.receipt.is_some(), "the stream ended without a receipt");
        answered.tokens_out = answered.tokens_out.max(counted);
        Ok(())
    }
}

/// How many tokens a chunk brings. Its ids say so; text without ids counts as one token, and is marked as guessed.
fn tokens_of(chunk: &Value, answered: &mut Answered) -> Option<u32> {
    let choice = &chunk["choices"][0];
    if let Some(ids) = choice["token_ids"].as_array() {
        return u32::try_from(ids.len()).ok().filter(|tokens| *tokens > 0);
    }
    let has_text = choice["text"].as_str().is_some_and(|text| !text.is_empty());
    answered.are_pieces_guessed |= has_text;
    has_text.then_some(1)
}

/// Notes the receipt and the usage of an answer or of a part of it.
fn note(body: &Value, answered: &mut Answered) {
    let receipt = body["butterfly"]["receipt_id"].as_str().or_else(|| body["receipt_id"].as_str());
    answered.receipt = receipt.map(str::to_owned).or(answered.receipt.take());
    let usage = &body["usage"];
    answered.tokens_in = usage["prompt_tokens"].as_u64().unwrap_or(answered.tokens_in);
    answered.tokens_out = usage["completion_tokens"].as_u64().unwrap_or(answered.tokens_out);
}

/// Server-sent events, put together from whatever arrives.
#[derive(Default)]
struct Events {
    bytes: Vec<u8>,
    /// Up to here there is no end of an event.
    searched: usize,
}

impl Events {
    fn push(&mut self, data: &[u8]) -> anyhow::Result<()> {
        let bytes = self.bytes.len() + data.len();
        anyhow::ensure!(bytes <= EVENT_BYTES_MAX, "an event of more than {EVENT_BYTES_MAX} bytes");
        self.bytes.extend_from_slice(data);
        Ok(())
    }

    fn next(&mut self) -> Option<Vec<u8>> {
        let found = self.bytes[self.searched..].windows(2).position(|pair| pair == b"\n\n");
        let Some(at) = found else {
            self.searched = self.bytes.len().saturating_sub(1);
            return None;
        };
        let rest = self.bytes.split_off(self.searched + at + 2);
        self.searched = 0;
        Some(std::mem::replace(&mut self.bytes, rest))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_found_however_they_are_cut() {
        let text = b"data: {\"a\": 1}\n\n: waiting\n\ndata: [DONE]\n\n";
        for size in 1..text.len() {
            let mut events = Events::default();
            let mut found = Vec::new();
            for part in text.chunks(size) {
                events.push(part).unwrap();
                found.extend(std::iter::from_fn(|| events.next()));
            }
            assert_eq!(found.concat(), text);
            assert_eq!(found.len(), 3, "in parts of {size}");
        }
        assert!(Events::default().push(&vec![b'x'; EVENT_BYTES_MAX + 1]).is_err());
    }

    #[test]
    fn tokens_are_counted_by_their_ids_or_the_guess_is_told() {
        let mut answered = Answered::default();
        let chunk = |text: &str| serde_json::from_str::<Value>(text).unwrap();
        let counted = chunk(r#"{"choices": [{"text": "", "token_ids": [4, 5, 6]}]}"#);
        assert_eq!(tokens_of(&counted, &mut answered), Some(3), "held-back text has its tokens all the same");
        let none = chunk(r#"{"choices": [{"text": "", "token_ids": []}]}"#);
        assert_eq!(tokens_of(&none, &mut answered), None);
        assert_eq!(tokens_of(&chunk(r#"{"choices": [], "usage": {}}"#), &mut answered), None);
        assert!(!answered.are_pieces_guessed);
        assert_eq!(tokens_of(&chunk(r#"{"choices": [{"text": "ab"}]}"#), &mut answered), Some(1));
        assert!(answered.are_pieces_guessed);
    }

    #[test]
    fn an_address_that_cannot_be_asked_is_refused() {
        for bad in ["https://a:1", "http://a", "a", "http://:80", "http://a:99999", "http://a:80/path"] {
            assert!(Gateway::new(bad, None).is_err(), "{bad}");
        }
        for good in ["http://127.0.0.1:8080", "http://gateway.example:80/", "localhost:1", "http://[::1]:80"] {
            assert!(Gateway::new(good, None).is_ok(), "{good}");
        }
    }
}

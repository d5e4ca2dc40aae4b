//! The listener: connections, bounded in number and in patience.
//!
//! Invariants: at most so many connections are open; one more is told so and closed. A client that does not finish its
//! headers, or does not read what it is sent, is cut, so that it cannot hold a place for long. A connection whose client
//! goes away drops its request, and with it whatever waits for it.
//!
//! It refuses to know routes.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use butterfly_engine::clock::{Clock, timeout};
use futures::future::BoxFuture;
use hyper::service::Service as _;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::errors::Failure;
use super::gate::Peer;

/// How long the headers of a request may take, and how long a connection may be idle between two.
const HEADERS_WITHIN: Duration = Duration::from_secs(30);
/// How long a client may read nothing of what it is sent.
const WRITE_STALL_MAX: Duration = Duration::from_secs(30);
/// Header lines that are read at most. The gate refuses fewer, with an answer in the form of all failures.
const HEADERS_MAX: usize = 256;
/// Bytes of a connection's buffer, which bounds the headers that are read in the same way.
const BUFFER_BYTES_MAX: usize = 128 << 10;
/// Connections that are told at the same time that there are too many.
const REFUSALS_MAX: usize = 64;
/// How long such a connection is listened to, so that its client reads the answer instead of a reset.
const REFUSAL_WITHIN: Duration = Duration::from_secs(1);
/// Rest after the system could not give a connection.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// A listener of a node.
pub(crate) struct Server {
    listener: TcpListener,
    router: Router,
    clock: Arc<dyn Clock>,
    places: Arc<Semaphore>,
    refusals: Arc<Semaphore>,
    closing: CancellationToken,
    connections: JoinSet<()>,
}

impl Server {
    /// A server on a bound listener.
    #[must_use]
    pub(crate) fn new(listener: TcpListener, router: Router, connections_max: usize, clock: Arc<dyn Clock>) -> Self {
        Self {
            listener,
            router,
            clock,
            places: Arc::new(Semaphore::new(connections_max.min(Semaphore::MAX_PERMITS))),
            refusals: Arc::new(Semaphore::new(REFUSALS_MAX)),
            closing: CancellationToken::new(),
            connections: JoinSet::new(),
        }
    }

    /// Accepts connections until dropped. Dropping this future, unlike dropping the server, leaves connections running.
    pub(crate) async fn accept(&mut self) {
        loop {
            let accepted = tokio::select! {
                accepted = self.listener.accept() => accepted,
                Some(ended) = self.connections.join_next() => {
                    if let Err(error) = ended && error.is_panic() {
                        tracing::error!("the handling of a connection panicked");
                    }
                    continue;
                }
            };
            match accepted {
                Ok((stream, peer)) => self.open(stream, peer),
                Err(error) => {
                    // What fails here is one connection, or the process is out of descriptors.
                    tracing::warn!(%error, "a connection could not be accepted");
                    self.clock.sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    /// Lets every connection finish the request it is at, and resolves when all have. Safe to cancel.
    pub(crate) async fn finish(&mut self) {
        self.closing.cancel();
        while self.connections.join_next().await.is_some() {}
    }

    fn open(&mut self, stream: TcpStream, peer: SocketAddr) {
        // Without it small chunks of a stream wait for each other.
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%error, "a connection has gone at once");
            return;
        }
        let clock = Arc::clone(&self.clock);
        if let Ok(place) = Arc::clone(&self.places).try_acquire_owned() {
            let connection = serve(stream, peer, self.router.clone(), clock, self.closing.clone());
            self.connections.spawn(async move {
                connection.await;
                drop(place);
            });
        } else if let Ok(turn) = Arc::clone(&self.refusals).try_acquire_owned() {
            self.connections.spawn(async move {
                let _ = timeout(&*clock, REFUSAL_WITHIN, refuse(stream)).await;
                drop(turn);
            });
        }
    }
}

/// Serves one connection to its end.
async fn serve(stream: TcpStream, peer: SocketAddr, router: Router, clock: Arc<dyn Clock>, closing: CancellationToken) {
    let service = TowerToHyperService::new(router);
    let is_used = Arc::new(AtomicBool::new(false));
    let used = Arc::clone(&is_used);
    let service = hyper::service::service_fn(move |request: hyper::Request<hyper::body::Incoming>| {
        used.store(true, Ordering::Relaxed);
        let mut request = request.map(Body::new);
        request.extensions_mut().insert(Peer(peer));
        service.call(request)
    });
    let mut builder = hyper::server::conn::http1::Builder::new();
    builder
        .timer(TokioTimer::new())
        .header_read_timeout(HEADERS_WITHIN)
        .max_headers(HEADERS_MAX)
        .max_buf_size(BUFFER_BYTES_MAX);
    let io = TokioIo::new(Patient { inner: stream, clock, stalled: None });
    let mut connection = std::pin::pin!(builder.serve_connection(io, service));
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = closing.cancelled() => {
            // One that has not said anything yet would be waited for until its headers are late.
            if !is_used.load(Ordering::Relaxed) {
                return;
            }
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%peer, %error, "a connection ended early");
    }
}

/// Tells a client that there are too many connections.
async fn refuse(mut stream: TcpStream) -> io::Result<()> {
    let failure = Failure::too_many_connections();
    let body = failure.envelope();
    let head = format!(
        "HTTP/1.1 429 Too Many Requests\r\ncontent-type: application/json\r\ncontent-length: {}\r\nretry-after: 1\r\n\
         x-request-id: refused\r\nconnection: close\r\n\r\n",
        body.len()
    );
    // An answer before the question would be none to a client that has not asked yet.
    let mut scratch = [0; 4096];
    if stream.read(&mut scratch).await? == 0 {
        return Ok(());
    }
    stream.write_all(head.as_bytes()).await?;
    stream.write_all(&body).await?;
    stream.shutdown().await?;
    // What it sends is read, because closing with bytes unread would reset the connection before it reads the answer.
    while stream.read(&mut scratch).await? > 0 {}
    Ok(())
}

/// A stream that gives up on a peer that takes no bytes for [`WRITE_STALL_MAX`].
struct Patient<S> {
    inner: S,
    clock: Arc<dyn Clock>,
    stalled: Option<BoxFuture<'static, ()>>,
}

impl<S> Patient<S> {
    /// Passes a result on, or an error when writing has been pending for too long.
    fn watch<T>(&mut self, cx: &mut Context<'_>, result: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if result.is_ready() {
            self.stalled = None;
            return result;
        }
        let clock = &self.clock;
        let stalled = self.stalled.get_or_insert_with(|| clock.sleep(WRITE_STALL_MAX));
        ready!(stalled.as_mut().poll(cx));
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Patient<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_read(cx, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Patient<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.inner).poll_write(cx, bytes);
        self.watch(cx, result)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let result = Pin::new(&mut self.inner).poll_flush(cx);
        self.watch(cx, result)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let result = Pin::new(&mut self.inner).poll_shutdown(cx);
        self.watch(cx, result)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.inner).poll_write_vectored(cx, slices);
        self.watch(cx, result)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use butterfly_engine::clock::ManualClock;

    use super::*;

    #[tokio::test]
    async fn a_peer_that_reads_nothing_is_given_up_and_one_that_reads_is_not() {
        let clock = ManualClock::new(0);
        let (near, mut far) = tokio::io::duplex(16);
        let mut near = Patient { inner: near, clock: Arc::new(clock.clone()), stalled: None };
        near.write_all(&[1; 16]).await.unwrap();
        let write = near.write_all(&[2; 8]);
        let read = async {
            clock.sleepers(1).await;
            clock.advance(WRITE_STALL_MAX - Duration::from_millis(1));
            let mut bytes = [0; 16];
            far.read_exact(&mut bytes).await.unwrap();
        };
        let (written, ()) = futures::join!(write, read);
        written.unwrap();
        near.write_all(&[3; 8]).await.unwrap();
        let write = near.write_all(&[4; 8]);
        let stall = async {
            clock.sleepers(1).await;
            clock.advance(WRITE_STALL_MAX);
        };
        let (written, ()) = futures::join!(write, stall);
        assert_eq!(written.unwrap_err().kind(), io::ErrorKind::TimedOut);
    }
}

//! The admin listener of a node: what its operator watches it by.
//!
//! | part | module |
//! | --- | --- |
//! | the secret that a caller must know | `token` |
//! | routes, and who may ask | `routes` |
//! | stages, edges, nodes, requests, receipts as JSON | `views` |
//! | events, and items that pass a stage, while they do | `watch` |
//!
//! A node has one where the topology gives it an `admin_address`. It answers while the node starts and drains.
//!
//! Invariants: without the secret nothing is told but whether the node lives and is ready; nothing here changes anything;
//! what it keeps for a caller is bounded.
//!
//! It refuses to know what a request says: it tells digests, times and counts, and what is in an item only to a tap that
//! asks for the payload.

mod routes;
mod token;
mod views;
mod watch;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use butterfly_engine::shutdown::Shutdown;
use butterfly_engine::stage::Readiness;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

pub use token::{TokenError, read_secret};

use crate::ingest::Server;
use crate::services::Services;
use routes::{Console, router};
use token::Token;

/// Open connections; an operator and a scraper need a few.
const CONNECTIONS_MAX: usize = 64;
/// How long nothing may move before the node is not ready, where no ingest stage says it.
const STALLED_AFTER_DEFAULT: Duration = Duration::from_secs(30);

/// The listener, bound; it answers once it is [served](Admin::serve).
#[derive(Debug)]
pub struct Admin {
    listener: TcpListener,
    address: SocketAddr,
    token: Token,
}

/// The listener, answering until dropped.
#[derive(Debug)]
pub struct Serving {
    address: SocketAddr,
    task: JoinHandle<()>,
}

/// Why there is no admin listener.
#[derive(Debug, thiserror::Error)]
pub enum AdminError {
    /// The secret cannot be read.
    #[error(transparent)]
    Token(#[from] TokenError),
    /// The address cannot be bound.
    #[error(
        "the admin listener cannot bind {address}: {source}; give the node another `admin_address`, or stop what uses it"
    )]
    Bind {
        /// The address.
        address: SocketAddr,
        /// Why.
        source: std::io::Error,
    },
}

impl Admin {
    /// Reads the secret and binds the address.
    ///
    /// # Errors
    /// When the file of the secret is not as it should be, and when the address cannot be bound.
    pub async fn bind(address: SocketAddr, token_file: PathBuf) -> Result<Self, AdminError> {
        let token = Token::read(&token_file)?;
        let bound = TcpListener::bind(address).await.and_then(|listener| Ok((listener.local_addr()?, listener)));
        let (address, listener) = bound.map_err(|source| AdminError::Bind { address, source })?;
        Ok(Self { listener, address, token })
    }

    /// Answers for a node from now on.
    #[must_use]
    pub fn serve(self, services: Services, readiness: Readiness, shutdown: Shutdown) -> Serving {
        let Self { listener, address, token } = self;
        let ingest = services.topology.graph.of_kind("ingest").next();
        let seconds = ingest.and_then(|stage| stage.config.integer("request_timeout_secs"));
        let stalled_after = seconds.and_then(|seconds| u64::try_from(seconds).ok());
        let stalled_after = stalled_after.map_or(STALLED_AFTER_DEFAULT, Duration::from_secs);
        let clock = Arc::clone(&services.clock);
        tracing::info!(node = %services.node, %address, "the admin listener answers");
        let console = Arc::new(Console { services, readiness, shutdown, stalled_after, token });
        let mut server = Server::new(listener, router(console), CONNECTIONS_MAX, clock);
        let task = tokio::spawn(async move { server.accept().await });
        Serving { address, task }
    }
}

impl Serving {
    /// Where it answers.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        // Dropping the server with its task ends every connection, streams of events among them.
        self.task.abort();
    }
}

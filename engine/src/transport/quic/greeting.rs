//! Hello and welcome on a fresh connection.
//!
//! The dialler opens the first stream and says hello; the accepter judges it and answers welcome, or closes with the
//! reason. A greeting is two bytes of length and that many bytes.
//!
//! Invariants: both sides are done within the time limit, or the connection is closed; nothing but greetings is read or
//! written here.

use std::time::Duration;

use butterfly_topology::NodeId;
use quinn::{Connecting, Connection, Incoming, ReadExactError, RecvStream, SendStream, WriteError};

use super::super::DownReason;
use super::super::identity::{EXPORTER_BYTES, EXPORTER_LABEL, Greeter, HELLO_BYTES_MAX, Proved, Refusal, Role};
use super::{close, reason_of};

/// Messages go before frames.
const MESSAGE_PRIORITY: i32 = 1;

/// A connection whose two ends have proved who they are, and the stream they did it on.
pub(super) struct Greeted {
    pub(super) peer: Proved,
    pub(super) connection: Connection,
    pub(super) send: SendStream,
    pub(super) receive: RecvStream,
}

/// Dials, says hello and judges the welcome.
pub(super) async fn dial(
    greeter: &Greeter,
    connecting: Connecting,
    peer: &NodeId,
    limit: Duration,
) -> Result<Greeted, DownReason> {
    let connection = established(connecting, limit).await?;
    let judged = tokio::time::timeout(limit, greet_as_dialler(greeter, &connection, peer)).await;
    finish(connection, judged.unwrap_or(Err(DownReason::Distrusted(Refusal::Late))))
}

/// Accepts, judges the hello and says welcome.
pub(super) async fn accept(greeter: &Greeter, incoming: Incoming, limit: Duration) -> Result<Greeted, DownReason> {
    let connection = established(incoming.accept().map_err(reason_of)?, limit).await?;
    let judged = tokio::time::timeout(limit, greet_as_accepter(greeter, &connection)).await;
    finish(connection, judged.unwrap_or(Err(DownReason::Distrusted(Refusal::Late))))
}

/// The connection once the encryption layer is done, which a peer may drag out as it may the greeting.
async fn established(connecting: Connecting, limit: Duration) -> Result<Connection, DownReason> {
    match tokio::time::timeout(limit, connecting).await {
        Ok(connected) => connected.map_err(reason_of),
        Err(_) => Err(DownReason::Unreachable("the encryption layer took too long".to_owned())),
    }
}

type Judged = Result<(Proved, SendStream, RecvStream), DownReason>;

fn finish(connection: Connection, judged: Judged) -> Result<Greeted, DownReason> {
    match judged {
        Ok((peer, send, receive)) => {
            // Fails only if the stream is closed, which whoever uses it next finds out.
            let _ = send.set_priority(MESSAGE_PRIORITY);
            Ok(Greeted { peer, connection, send, receive })
        }
        Err(reason) => {
            close(&connection, &reason);
            Err(reason)
        }
    }
}

async fn greet_as_dialler(greeter: &Greeter, connection: &Connection, peer: &NodeId) -> Judged {
    let exporter = exporter(connection)?;
    let (mut send, mut receive) = connection.open_bi().await.map_err(reason_of)?;
    let hello = greeter.greet(Role::Hello, peer, &exporter).map_err(|_| DownReason::ShutDown)?;
    write(&mut send, &hello).await?;
    let welcome = read(&mut receive).await?;
    let proved = greeter.judge_welcome(&welcome, peer, &exporter).map_err(DownReason::Distrusted)?;
    Ok((proved, send, receive))
}

async fn greet_as_accepter(greeter: &Greeter, connection: &Connection) -> Judged {
    let exporter = exporter(connection)?;
    let (mut send, mut receive) = connection.accept_bi().await.map_err(reason_of)?;
    let hello = read(&mut receive).await?;
    let proved = greeter.judge_hello(&hello, &exporter).map_err(DownReason::Distrusted)?;
    let welcome = greeter.greet(Role::Welcome, &proved.peer, &exporter).map_err(|_| DownReason::ShutDown)?;
    write(&mut send, &welcome).await?;
    Ok((proved, send, receive))
}

fn exporter(connection: &Connection) -> Result<[u8; EXPORTER_BYTES], DownReason> {
    let mut value = [0; EXPORTER_BYTES];
    match connection.export_keying_material(&mut value, EXPORTER_LABEL, &[]) {
        Ok(()) => Ok(value),
        Err(_) => Err(DownReason::Unreachable("the connection gives no exporter value".to_owned())),
    }
}

async fn write(send: &mut SendStream, greeting: &[u8]) -> Result<(), DownReason> {
    // Greetings have at most 256 bytes.
    let length = u16::try_from(greeting.len()).unwrap_or(u16::MAX);
    let bytes = [&length.to_le_bytes(), greeting].concat();
    send.write_all(&bytes).await.map_err(|error| match error {
        WriteError::ConnectionLost(error) => reason_of(error),
        error => DownReason::Unreachable(error.to_string()),
    })
}

async fn read(receive: &mut RecvStream) -> Result<Vec<u8>, DownReason> {
    let lost = |error| match error {
        ReadExactError::ReadError(quinn::ReadError::ConnectionLost(error)) => reason_of(error),
        _ => DownReason::Distrusted(Refusal::Malformed),
    };
    let mut length = [0; 2];
    receive.read_exact(&mut length).await.map_err(lost)?;
    let length = usize::from(u16::from_le_bytes(length));
    if length > HELLO_BYTES_MAX {
        return Err(DownReason::Distrusted(Refusal::Malformed));
    }
    let mut greeting = vec![0; length];
    receive.read_exact(&mut greeting).await.map_err(lost)?;
    Ok(greeting)
}

//! The streams of a welcomed connection: one for messages, one per lane and direction for frames.
//!
//! Frames leave as chunks that share the frame's buffer; small ones that wait together leave in one chunk. They arrive
//! as pieces of datagrams, each copied once into the buffer of its frame.
//!
//! Invariants: each stream has a task of its own, so none waits for another; a reader never waits for the stage, since
//! whatever was granted has its place.

use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use quinn::{Connection, ReadError, RecvStream, SendStream, WriteError};
use tokio::task::{JoinSet, coop};

use super::super::DownReason;
use super::super::lane::Lane;
use super::super::mesh::Core;
use super::super::session::Session;
use super::{fault, reason_of};
use crate::frame::{Assembly, Frame, FrameAssembler, HEADER_BYTES};
use crate::link::{LinkFault, LinkMessage};

/// Frames up to this size are copied next to each other, larger ones are shared.
const COPIED_BYTES_MAX: usize = 2 << 10;
/// Pieces of datagrams taken off a stream at a time.
const PIECES_MAX: usize = 16;

enum Done {
    Reader,
    Writer,
}

/// Serves a connection until it fails, or until the session has finished and everything is acknowledged.
pub(super) async fn serve(
    core: &Arc<Core>,
    session: &Arc<Session>,
    connection: &Connection,
    send: SendStream,
    receive: RecvStream,
) -> Result<(), DownReason> {
    // Dropping the set aborts its tasks, so they end with the connection.
    let mut tasks: JoinSet<Result<Done, DownReason>> = JoinSet::new();
    tasks.spawn(read_messages(Arc::clone(core), Arc::clone(session), receive));
    tasks.spawn(write_messages(Arc::clone(core), Arc::clone(session), send));
    let mut writers = 0_usize;
    loop {
        tokio::select! {
            opened = session.opened_lanes() => {
                for lane in opened {
                    writers += 1;
                    tasks.spawn(write_lane(connection.clone(), Arc::clone(session), lane));
                }
            }
            stream = connection.accept_uni() => {
                // At most one per lane is granted at a time, and a second one for a lane is a fault.
                tasks.spawn(read_lane(Arc::clone(core), Arc::clone(session), stream.map_err(reason_of)?));
            }
            Some(done) = tasks.join_next() => match done {
                Ok(Ok(Done::Writer)) => writers = writers.saturating_sub(1),
                Ok(Ok(Done::Reader)) => {}
                Ok(Err(reason)) => return Err(reason),
                Err(error) => return Err(DownReason::Unreachable(format!("a task of the link failed: {error}"))),
            },
            () = session.finishing(), if writers == 0 => return Ok(()),
        }
    }
}

async fn write_messages(core: Arc<Core>, session: Arc<Session>, mut send: SendStream) -> Result<Done, DownReason> {
    let mut bytes = Vec::new();
    loop {
        session.messages(&core, &mut bytes).await;
        send.write_all(&bytes).await.map_err(not_written)?;
        bytes.clear();
    }
}

async fn read_messages(core: Arc<Core>, session: Arc<Session>, mut receive: RecvStream) -> Result<Done, DownReason> {
    let mut bytes = Vec::new();
    while let Some(piece) = receive.read_chunk(usize::MAX, true).await.map_err(not_read)? {
        bytes.extend_from_slice(&piece.bytes);
        let mut rest = bytes.as_slice();
        while let Some(message) = LinkMessage::split_off(&mut rest).map_err(fault)? {
            session.handle(&core, message).map_err(fault)?;
        }
        // Less than one message is left.
        let used = bytes.len() - rest.len();
        bytes.drain(..used);
        coop::consume_budget().await;
    }
    Err(fault(LinkFault::Stream { what: "the stream of messages ended" }))
}

async fn write_lane(connection: Connection, session: Arc<Session>, lane: Arc<Lane>) -> Result<Done, DownReason> {
    let mut batch = Vec::new();
    let mut chunks = Vec::new();
    let mut small = BytesMut::new();
    let mut stream: Option<SendStream> = None;
    while let Some(number) = lane.next_batch(&session, &mut batch).await {
        for (sequence, frame) in batch.drain(..) {
            push_chunks(&mut chunks, &mut small, &frame, number, sequence);
        }
        if !small.is_empty() {
            chunks.push(small.split().freeze());
        }
        let stream = match &mut stream {
            Some(stream) => stream,
            none => none.insert(connection.open_uni().await.map_err(reason_of)?),
        };
        stream.write_all_chunks(&mut chunks).await.map_err(not_written)?;
        chunks.clear();
    }
    if let Some(mut stream) = stream {
        // Already closed means that there is nothing to wait for.
        if stream.finish().is_ok() {
            let _ = stream.stopped().await;
        }
    }
    Ok(Done::Writer)
}

fn push_chunks(chunks: &mut Vec<Bytes>, small: &mut BytesMut, frame: &Frame, lane: u16, sequence: u64) {
    let (header, body) = frame.stamped(lane, sequence);
    small.extend_from_slice(&header);
    if HEADER_BYTES + body.len() <= COPIED_BYTES_MAX {
        small.extend_from_slice(&body);
    } else {
        chunks.push(small.split().freeze());
        chunks.push(body);
    }
}

async fn read_lane(core: Arc<Core>, session: Arc<Session>, mut stream: RecvStream) -> Result<Done, DownReason> {
    let mut assembler = FrameAssembler::new();
    let mut lane: Option<Arc<Lane>> = None;
    let mut pieces = [const { Bytes::new() }; PIECES_MAX];
    while let Some(count) = stream.read_chunks(&mut pieces).await.map_err(not_read)? {
        for piece in pieces.iter_mut().take(count) {
            loop {
                match assembler.advance(piece).map_err(fault)? {
                    Assembly::Incomplete => break,
                    Assembly::Announced(header) => {
                        let lane = match &lane {
                            Some(lane) if lane.number() == header.lane() => lane,
                            Some(_) => return Err(fault(LinkFault::Stream { what: "a stream changed its lane" })),
                            None => lane.insert(session.begin_stream(&core, header.lane()).await.map_err(fault)?),
                        };
                        lane.announce(&session, &header).map_err(fault)?;
                    }
                    Assembly::Complete(frame) => {
                        if let Some(lane) = &lane {
                            lane.deliver(&session, frame);
                        }
                    }
                }
            }
            *piece = Bytes::new();
        }
        coop::consume_budget().await;
    }
    if assembler.is_between_frames() {
        Ok(Done::Reader)
    } else {
        Err(fault(LinkFault::Stream { what: "a stream ended inside a frame" }))
    }
}

fn not_written(error: WriteError) -> DownReason {
    match error {
        WriteError::ConnectionLost(error) => reason_of(error),
        WriteError::Stopped(_) => fault(LinkFault::Stream { what: "the peer stopped a stream" }),
        error @ (WriteError::ClosedStream | WriteError::ZeroRttRejected) => DownReason::Unreachable(error.to_string()),
    }
}

fn not_read(error: ReadError) -> DownReason {
    match error {
        ReadError::ConnectionLost(error) => reason_of(error),
        ReadError::Reset(_) => fault(LinkFault::Stream { what: "the peer reset a stream" }),
        error => DownReason::Unreachable(error.to_string()),
    }
}

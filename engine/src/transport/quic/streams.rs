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
use tokio::task::{JoinError, JoinSet, coop};
use tokio_util::sync::CancellationToken;

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

/// The streams of one connection and their tasks, which end with it: dropping the set aborts them.
pub(super) struct Streams {
    core: Arc<Core>,
    session: Arc<Session>,
    connection: Connection,
    tasks: JoinSet<(Kind, Result<(), DownReason>)>,
    readers: usize,
    writers: usize,
    /// No message will arrive any more.
    silent: CancellationToken,
}

#[derive(Clone, Copy)]
enum Kind {
    ReadMessages,
    WriteMessages,
    Reader,
    Writer,
}

impl Streams {
    /// Starts the stream of messages.
    pub(super) fn new(
        core: &Arc<Core>,
        session: &Arc<Session>,
        connection: &Connection,
        send: SendStream,
        receive: RecvStream,
    ) -> Self {
        let mut streams = Self {
            core: Arc::clone(core),
            session: Arc::clone(session),
            connection: connection.clone(),
            tasks: JoinSet::new(),
            readers: 0,
            writers: 0,
            silent: CancellationToken::new(),
        };
        streams.spawn(Kind::ReadMessages, read_messages(Arc::clone(core), Arc::clone(session), receive));
        streams.spawn(Kind::WriteMessages, write_messages(Arc::clone(core), Arc::clone(session), send));
        streams
    }

    /// Serves the connection until it fails, or until the session has finished and everything is acknowledged.
    pub(super) async fn serve(&mut self) -> Result<(), DownReason> {
        loop {
            tokio::select! {
                // A lane that is opened has frames to carry out, which finishing waits for.
                biased;
                opened = self.session.opened_lanes() => opened.into_iter().for_each(|lane| self.write(lane)),
                stream = self.connection.accept_uni() => self.read(stream.map_err(reason_of)?),
                Some(done) = self.tasks.join_next() => self.done(done)?,
                () = self.session.finishing(), if self.writers == 0 => return Ok(()),
            }
        }
    }

    /// Delivers what had arrived before the connection was lost: a peer that leaves in order loses nothing.
    pub(super) async fn drain(&mut self) {
        // All of this ends, since nothing more arrives.
        while let Ok(stream) = self.connection.accept_uni().await {
            self.read(stream);
        }
        while self.readers > 0 {
            match self.tasks.join_next().await {
                // Its reason is that of the connection, which is known.
                Some(done) => _ = self.done(done),
                None => return,
            }
        }
    }

    fn read(&mut self, stream: RecvStream) {
        // As many as there are lanes are granted, and a second one for a lane is a fault.
        let (core, session, silent) = (Arc::clone(&self.core), Arc::clone(&self.session), self.silent.clone());
        self.spawn(Kind::Reader, read_lane(core, session, silent, stream));
    }

    fn write(&mut self, lane: Arc<Lane>) {
        self.spawn(Kind::Writer, write_lane(self.connection.clone(), Arc::clone(&self.session), lane));
    }

    fn spawn(&mut self, kind: Kind, task: impl Future<Output = Result<(), DownReason>> + Send + 'static) {
        match kind {
            Kind::ReadMessages | Kind::Reader => self.readers += 1,
            Kind::Writer => self.writers += 1,
            Kind::WriteMessages => {}
        }
        self.tasks.spawn(async move { (kind, task.await) });
    }

    fn done(&mut self, done: Result<(Kind, Result<(), DownReason>), JoinError>) -> Result<(), DownReason> {
        let (kind, result) =
            done.map_err(|error| DownReason::Unreachable(format!("a task of the link failed: {error}")))?;
        match kind {
            Kind::ReadMessages => {
                self.readers = self.readers.saturating_sub(1);
                self.silent.cancel();
            }
            Kind::Reader => self.readers = self.readers.saturating_sub(1),
            Kind::Writer => self.writers = self.writers.saturating_sub(1),
            Kind::WriteMessages => {}
        }
        result
    }
}

async fn write_messages(core: Arc<Core>, session: Arc<Session>, mut send: SendStream) -> Result<(), DownReason> {
    let mut bytes = Vec::new();
    loop {
        session.messages(&core, &mut bytes).await;
        send.write_all(&bytes).await.map_err(not_written)?;
        bytes.clear();
    }
}

async fn read_messages(core: Arc<Core>, session: Arc<Session>, mut receive: RecvStream) -> Result<(), DownReason> {
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

async fn write_lane(connection: Connection, session: Arc<Session>, lane: Arc<Lane>) -> Result<(), DownReason> {
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
        coop::consume_budget().await;
    }
    if let Some(mut stream) = stream {
        // Already closed means that there is nothing to wait for.
        if stream.finish().is_ok() {
            let _ = stream.stopped().await;
        }
    }
    Ok(())
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

async fn read_lane(
    core: Arc<Core>,
    session: Arc<Session>,
    silent: CancellationToken,
    mut stream: RecvStream,
) -> Result<(), DownReason> {
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
                            None => {
                                let begun = tokio::select! {
                                    biased;
                                    begun = session.begin_stream(&core, header.lane()) => begun.map_err(fault)?,
                                    // The peer left before it had opened its end.
                                    () = silent.cancelled() => return Ok(()),
                                };
                                lane.insert(begun)
                            }
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
        Ok(())
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_frames_leave_together_and_large_ones_without_a_copy() {
        let (small, large) = (Frame::control(&[1; 100]).unwrap(), Frame::tensor(&(), &[2; 100_000]).unwrap());
        let (mut chunks, mut gathered) = (Vec::new(), BytesMut::new());
        for (sequence, frame) in [&small, &small, &large, &small].into_iter().enumerate() {
            push_chunks(&mut chunks, &mut gathered, frame, 4, sequence as u64);
        }
        chunks.push(gathered.split().freeze());
        let lengths: Vec<_> = chunks.iter().map(Bytes::len).collect();
        let (small_bytes, large_bytes) = (small.size_bytes(), large.size_bytes());
        assert_eq!(lengths, [2 * small_bytes + HEADER_BYTES, large_bytes - HEADER_BYTES, small_bytes]);
        assert_eq!(chunks[1].as_ptr(), large.as_bytes()[HEADER_BYTES..].as_ptr());
    }
}

//! What happened to recent requests on this node: a timeline for each, by this node's own clock.
//!
//! A request is known here by its digest alone. The context that came with it (its client's trace, and the id that the HTTP
//! edge gave it) is carried beside it from node to node and decides nothing.
//!
//! Invariants: at most [`TRACED_MAX`] timelines of at most [`MARKS_MAX`] marks are kept, the oldest goes first; a mark of a
//! request that was not begun leaves nothing behind, so that a peer cannot push out timelines by naming requests that do
//! not exist. Times are one node's claim: two nodes' times are never subtracted from each other.
//!
//! It refuses to know what the marks mean.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use butterfly_topology::NodeId;
use serde::{Serialize, Serializer};

use crate::clock::Clock;

/// Requests whose timelines are kept.
pub const TRACED_MAX: usize = 1024;
/// Marks of one timeline.
pub const MARKS_MAX: usize = 192;
/// Marks of one timeline that are kept for what happens at the end, however long the request is.
const LAST_MARKS: usize = 24;
/// Longest id that a client's request may bring along.
pub const REQUEST_ID_BYTES_MAX: usize = 128;

/// The digest that names a request.
pub type TraceKey = [u8; 32];

/// Where a request comes from, in the terms of W3C Trace Context and of the HTTP edge.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TraceContext {
    /// The trace; never all zero.
    pub trace_id: [u8; 16],
    /// The span of whoever sent the request; all zero if the trace begins here.
    pub parent_id: [u8; 8],
    /// Flags of the trace; 1 is "sampled".
    pub flags: u8,
    /// The id of the HTTP request.
    pub request_id: Arc<str>,
}

impl TraceContext {
    /// Reads a `traceparent` header: `00-<32 hex>-<16 hex>-<2 hex>`, lower case. A later version may have more behind it.
    pub fn parse(traceparent: &str, request_id: &str) -> Option<Self> {
        let mut parts = traceparent.trim().split('-');
        let version: [u8; 1] = lower_hex(parts.next()?)?;
        let trace_id: [u8; 16] = lower_hex(parts.next()?)?;
        let parent_id: [u8; 8] = lower_hex(parts.next()?)?;
        let [flags] = lower_hex(parts.next()?)?;
        let has_more = parts.next().is_some();
        let is_valid = version != [0xff] && !(version == [0] && has_more) && trace_id != [0; 16] && parent_id != [0; 8];
        is_valid.then(|| Self { trace_id, parent_id, flags, request_id: Arc::from(request_id) })
    }

    /// A trace that begins here; `entropy` names it.
    pub fn new(entropy: [u8; 16], request_id: &str) -> Self {
        let mut trace_id = entropy;
        if trace_id == [0; 16] {
            trace_id = [1; 16];
        }
        Self { trace_id, parent_id: [0; 8], flags: 1, request_id: Arc::from(request_id) }
    }
}

fn lower_hex<const N: usize>(text: &str) -> Option<[u8; N]> {
    let is_lower = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
    let mut bytes = [0; N];
    (text.bytes().all(is_lower) && hex::decode_to_slice(text, &mut bytes).is_ok()).then_some(bytes)
}

/// Something that happened to a request, or took a while.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Mark {
    /// The stage.
    pub stage: &'static str,
    /// What it did, in snake case.
    pub what: &'static str,
    /// When, in microseconds since the timeline began; set when the mark is made.
    pub at_us: u64,
    /// How long it took until then, in microseconds.
    #[serde(skip_serializing_if = "is_zero")]
    pub took_us: u64,
    /// The slice concerned.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub slice: Option<u16>,
    /// The node at the other end.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub peer: Option<NodeId>,
    /// How many rows, tokens or votes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub count: Option<u32>,
}

fn is_zero(number: &u64) -> bool {
    *number == 0
}

impl Mark {
    /// A mark without particulars.
    #[must_use]
    pub fn new(stage: &'static str, what: &'static str) -> Self {
        Self { stage, what, at_us: 0, took_us: 0, slice: None, peer: None, count: None }
    }

    /// Says how long it took.
    #[must_use]
    pub fn took(mut self, took: Duration) -> Self {
        self.took_us = micros(took);
        self
    }

    /// Names the slice.
    #[must_use]
    pub fn slice(mut self, slice: u16) -> Self {
        self.slice = Some(slice);
        self
    }

    /// Names the node at the other end.
    #[must_use]
    pub fn peer(mut self, peer: &NodeId) -> Self {
        self.peer = Some(peer.clone());
        self
    }

    /// Says how many.
    #[must_use]
    pub fn count(mut self, count: usize) -> Self {
        self.count = Some(u32::try_from(count).unwrap_or(u32::MAX));
        self
    }
}

/// What happened to one request on one node.
#[derive(Debug, Clone, Serialize)]
pub struct Timeline {
    /// The request's digest, in hex.
    #[serde(serialize_with = "hex_text")]
    pub request: TraceKey,
    /// Other names of the request, such as a task id.
    pub names: Vec<String>,
    /// The id of the HTTP request, and its trace, if they are known.
    #[serde(flatten)]
    pub context: Option<Context>,
    /// Calendar time when the timeline began, in microseconds since 1970, as this node claims it.
    pub began_unix_us: u64,
    /// What happened, in order.
    pub marks: Vec<Mark>,
    /// Marks that had no room.
    pub marks_dropped: u64,
    #[serde(skip)]
    began: Duration,
}

/// A [`TraceContext`] as text.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Context {
    /// Id of the HTTP request.
    pub request_id: String,
    /// The trace, in hex.
    pub trace_id: String,
    /// The client's span, in hex; absent if the trace began at the HTTP edge.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub parent_id: Option<String>,
}

impl From<&TraceContext> for Context {
    fn from(context: &TraceContext) -> Self {
        Self {
            request_id: context.request_id.to_string(),
            trace_id: hex::encode(context.trace_id),
            parent_id: (context.parent_id != [0; 8]).then(|| hex::encode(context.parent_id)),
        }
    }
}

fn hex_text<S: Serializer>(key: &TraceKey, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&hex::encode(key))
}

/// The timelines of a node.
#[derive(Debug)]
pub struct Traces {
    clock: Arc<dyn Clock>,
    kept: Mutex<Kept>,
}

#[derive(Debug, Default)]
struct Kept {
    /// Oldest first.
    order: VecDeque<TraceKey>,
    timelines: HashMap<TraceKey, Entry>,
}

#[derive(Debug)]
struct Entry {
    timeline: Timeline,
    context: Option<TraceContext>,
}

impl Traces {
    pub(super) fn new(clock: Arc<dyn Clock>) -> Self {
        Self { clock, kept: Mutex::default() }
    }

    /// Begins the timeline of a request, or adds to one that has begun what was not known of it.
    pub fn begin(&self, key: TraceKey, context: Option<&TraceContext>) {
        let mut kept = self.lock();
        if let Some(entry) = kept.timelines.get_mut(&key) {
            if entry.context.is_none() {
                entry.context = context.cloned();
                entry.timeline.context = context.map(Context::from);
            }
            return;
        }
        if kept.order.len() >= TRACED_MAX
            && let Some(oldest) = kept.order.pop_front()
        {
            kept.timelines.remove(&oldest);
        }
        let timeline = Timeline {
            request: key,
            names: Vec::new(),
            context: context.map(Context::from),
            began_unix_us: self.clock.unix_ms().saturating_mul(1000),
            marks: Vec::new(),
            marks_dropped: 0,
            began: self.clock.now(),
        };
        kept.order.push_back(key);
        kept.timelines.insert(key, Entry { timeline, context: context.cloned() });
    }

    /// Gives a request one more name, by which [`find`](Self::find) finds it.
    pub fn name(&self, key: &TraceKey, name: &str) {
        const NAMES_MAX: usize = 4;
        let mut kept = self.lock();
        let Some(entry) = kept.timelines.get_mut(key) else { return };
        let names = &mut entry.timeline.names;
        if names.len() < NAMES_MAX && !names.iter().any(|known| known == name) {
            names.push(name.to_owned());
        }
    }

    /// Notes that something happened just now.
    pub fn mark(&self, key: &TraceKey, mark: Mark) {
        self.add(key, mark, MARKS_MAX - LAST_MARKS);
    }

    /// Notes something that belongs to the end of a request, for which room is kept.
    pub fn mark_last(&self, key: &TraceKey, mark: Mark) {
        self.add(key, mark, MARKS_MAX);
    }

    fn add(&self, key: &TraceKey, mark: Mark, marks_max: usize) {
        let now = self.clock.now();
        let mut kept = self.lock();
        let Some(Entry { timeline, .. }) = kept.timelines.get_mut(key) else { return };
        if timeline.marks.len() >= marks_max {
            timeline.marks_dropped = timeline.marks_dropped.saturating_add(1);
            return;
        }
        timeline.marks.push(Mark { at_us: micros(now.saturating_sub(timeline.began)), ..mark });
    }

    /// Where a request comes from, to be carried to other nodes.
    pub fn context(&self, key: &TraceKey) -> Option<TraceContext> {
        self.lock().timelines.get(key)?.context.clone()
    }

    /// A span for log lines about a request, with the ids by which it can be followed.
    pub fn span(&self, key: &TraceKey) -> tracing::Span {
        // At the level that no filter but `off` takes away: a span adds fields to lines, it is no line.
        match self.context(key) {
            Some(context) => tracing::error_span!(
                "request",
                request_id = &*context.request_id,
                trace_id = %hex::encode(context.trace_id)
            ),
            None => tracing::Span::none(),
        }
    }

    /// The newest timeline of this digest (in hex), request id, trace id, or other name.
    pub fn find(&self, id: &str) -> Option<Timeline> {
        let kept = self.lock();
        let is_meant = |timeline: &Timeline| {
            let known = |context: &Context| context.request_id == id || context.trace_id == id;
            hex::encode(timeline.request) == id
                || timeline.names.iter().any(|name| name == id)
                || timeline.context.as_ref().is_some_and(known)
        };
        let newest_first = kept.order.iter().rev().filter_map(|key| kept.timelines.get(key));
        newest_first.map(|entry| &entry.timeline).find(|timeline| is_meant(timeline)).cloned()
    }

    /// The newest timelines, newest first, at most so many.
    pub fn newest(&self, max: usize) -> Vec<Timeline> {
        let kept = self.lock();
        let newest_first = kept.order.iter().rev().filter_map(|key| kept.timelines.get(key));
        newest_first.take(max).map(|entry| entry.timeline.clone()).collect()
    }

    fn lock(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::ManualClock;

    const PARENT: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

    fn key(number: usize) -> TraceKey {
        let mut key = [0; 32];
        key[..8].copy_from_slice(&(number as u64).to_be_bytes());
        key
    }

    #[test]
    fn trace_parents_are_read_as_the_specification_says() {
        let context = TraceContext::parse(PARENT, "r").unwrap();
        assert_eq!(Context::from(&context).trace_id, "0af7651916cd43dd8448eb211c80319c");
        assert_eq!((context.flags, Context::from(&context).parent_id.unwrap().as_str()), (1, "b7ad6b7169203331"));
        assert!(TraceContext::parse(&PARENT.replacen("00", "01", 1).replace("-01", "-01-more"), "r").is_some());
        for wrong in [
            "",
            "00",
            &PARENT.to_uppercase(),
            &PARENT.replacen("00", "ff", 1),
            &format!("{PARENT}-more"),
            &PARENT.replace("b7ad6b7169203331", "0000000000000000"),
            &PARENT.replace("0af7651916cd43dd8448eb211c80319c", &"0".repeat(32)),
            &PARENT.replace("b7ad", "b7"),
        ] {
            assert_eq!(TraceContext::parse(wrong, "r"), None, "{wrong}");
        }
    }

    #[test]
    fn a_timeline_is_told_by_its_own_clock_and_found_by_every_name() {
        let clock = ManualClock::new(5_000);
        let traces = Traces::new(Arc::new(clock.clone()));
        clock.advance(Duration::from_secs(1));
        traces.begin(key(1), TraceContext::parse(PARENT, "req-1").as_ref());
        traces.name(&key(1), "task-1");
        clock.advance(Duration::from_millis(3));
        traces.mark(&key(1), Mark::new("compute", "pass").took(Duration::from_millis(2)).slice(1));
        for id in [&hex::encode(key(1)), "req-1", "task-1", "0af7651916cd43dd8448eb211c80319c"] {
            let found = traces.find(id).unwrap();
            assert_eq!((found.began_unix_us, found.marks[0].at_us, found.marks[0].took_us), (6_000_000, 3_000, 2_000));
        }
        assert!(traces.find("other").is_none());
    }

    #[test]
    fn what_is_kept_is_bounded_and_the_end_has_room() {
        let traces = Traces::new(Arc::new(ManualClock::new(0)));
        traces.mark(&key(7), Mark::new("compute", "pass"));
        assert!(traces.newest(1).is_empty(), "a mark alone begins nothing");
        for number in 0..TRACED_MAX + 3 {
            traces.begin(key(number), None);
        }
        assert_eq!(traces.newest(usize::MAX).len(), TRACED_MAX);
        assert!(traces.find(&hex::encode(key(2))).is_none() && traces.find(&hex::encode(key(3))).is_some());
        for _ in 0..2 * MARKS_MAX {
            traces.mark(&key(9), Mark::new("compute", "pass"));
        }
        traces.mark_last(&key(9), Mark::new("commit", "settled"));
        let timeline = traces.find(&hex::encode(key(9))).unwrap();
        assert_eq!(timeline.marks.last().unwrap().what, "settled");
        assert_eq!(timeline.marks.len() as u64 + timeline.marks_dropped, 2 * MARKS_MAX as u64 + 1);
    }
}

//! What comes back to whoever waits for a task: tokens as they are released, then the end, once.
//!
//! Invariants: the sender never waits; at most as many tokens are kept as the request may generate; the receiver hears all
//! tokens in order and then exactly one end, even if the sender just goes away.
//!
//! It refuses to know what tokens mean.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

use super::board::TaskResult;
use crate::error::TaskError;
use crate::model::Sampled;

/// The end that the board holds.
#[derive(Debug)]
pub struct ReplySender(Arc<Shared>);

/// The end that waits.
#[derive(Debug)]
pub struct ReplyReceiver(Arc<Shared>);

/// What comes back.
#[derive(Debug, Clone)]
pub enum Reply {
    /// Tokens that f+1 replicas agree on, following those before.
    Tokens(Vec<Sampled>),
    /// The end; nothing follows.
    End(TaskResult),
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    wake: Notify,
    tokens_max: usize,
}

#[derive(Debug, Default)]
struct State {
    /// Tokens taken so far, whether read or not.
    count: usize,
    unread: Vec<Sampled>,
    end: Option<TaskResult>,
}

/// Both ends, for a task that gives at most `tokens_max` tokens.
#[must_use]
pub fn reply(tokens_max: usize) -> (ReplySender, ReplyReceiver) {
    let shared = Arc::new(Shared { state: Mutex::default(), wake: Notify::new(), tokens_max });
    (ReplySender(Arc::clone(&shared)), ReplyReceiver(shared))
}

impl ReplySender {
    /// Hands on tokens, the first of which is number `index` of the answer. What was heard before is left out, and what
    /// would leave a gap: the end brings the whole answer.
    pub fn tokens(&self, index: usize, tokens: &[Sampled]) {
        let mut state = self.0.lock();
        let known = state.count.saturating_sub(index);
        if index > state.count {
            return;
        }
        let room = self.0.tokens_max.saturating_sub(state.count);
        let fresh = tokens.get(known..).unwrap_or_default();
        let fresh = fresh.get(..room).unwrap_or(fresh);
        state.unread.extend_from_slice(fresh);
        state.count += fresh.len();
        drop(state);
        self.0.wake.notify_one();
    }

    /// Whether anyone still waits.
    #[must_use]
    pub fn is_heard(&self) -> bool {
        Arc::strong_count(&self.0) > 1
    }

    /// Tells the end.
    pub fn end(self, result: TaskResult) {
        self.0.end(result);
    }
}

impl Drop for ReplySender {
    fn drop(&mut self) {
        self.0.end(Err(TaskError::Draining));
    }
}

impl ReplyReceiver {
    /// What comes next. Safe to cancel. After the end it gives the end again.
    pub async fn next(&mut self) -> Reply {
        loop {
            if let Some(reply) = self.0.take() {
                return reply;
            }
            // There is one receiver, and a wake-up that comes before this line is kept for it.
            self.0.wake.notified().await;
        }
    }

    /// The end, passing over tokens. Safe to cancel.
    pub async fn end(&mut self) -> TaskResult {
        loop {
            if let Reply::End(result) = self.next().await {
                return result;
            }
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(&self) -> Option<Reply> {
        let mut state = self.lock();
        if !state.unread.is_empty() {
            return Some(Reply::Tokens(std::mem::take(&mut state.unread)));
        }
        state.end.clone().map(Reply::End)
    }

    fn end(&self, result: TaskResult) {
        self.lock().end.get_or_insert(result);
        self.wake.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    fn sampled(tokens: &[u32]) -> Vec<Sampled> {
        tokens.iter().copied().map(Sampled::from).collect()
    }

    fn next(receiver: &mut ReplyReceiver) -> Option<Vec<Sampled>> {
        match receiver.next().now_or_never()? {
            Reply::Tokens(tokens) => Some(tokens),
            Reply::End(_) => None,
        }
    }

    #[test]
    fn tokens_come_once_in_order_without_gaps_and_never_more_than_may_be() {
        let (sender, mut receiver) = reply(6);
        assert!(receiver.next().now_or_never().is_none());
        sender.tokens(0, &sampled(&[1, 2]));
        sender.tokens(1, &sampled(&[2, 3]));
        sender.tokens(0, &sampled(&[1]));
        sender.tokens(4, &sampled(&[5]));
        assert_eq!(next(&mut receiver), Some(sampled(&[1, 2, 3])));
        sender.tokens(3, &sampled(&[4, 5, 6, 7, 8]));
        assert_eq!(next(&mut receiver), Some(sampled(&[4, 5, 6])));
    }

    #[test]
    fn the_end_comes_after_the_tokens_and_the_first_end_stays() {
        let (sender, mut receiver) = reply(6);
        sender.tokens(0, &sampled(&[1]));
        sender.end(Err(TaskError::Cancelled));
        assert_eq!(next(&mut receiver), Some(sampled(&[1])));
        for _ in 0..2 {
            let end = receiver.end().now_or_never().unwrap();
            assert_eq!(end.unwrap_err(), TaskError::Cancelled);
        }
        let (sender, mut receiver) = reply(6);
        drop(sender);
        assert_eq!(receiver.end().now_or_never().unwrap().unwrap_err(), TaskError::Draining);
    }
}

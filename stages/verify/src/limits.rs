//! Every bound on what others may send, by name.
//!
//! A length is compared with its bound before anything is allocated for it. These bounds are absolute; an epoch's
//! [`Limits`](crate::Limits) may only be narrower.

/// Nodes in a roster.
pub const MEMBERS_MAX: usize = 4096;
/// Bytes of a node id, a cluster name, a model name, a profile name, a trust domain, a client id.
pub const NAME_BYTES_MAX: usize = 256;
/// Slices of a plan.
pub const SLICES_MAX: usize = 1024;
/// Byzantine nodes tolerated per slice; a replica set holds twice as many and one.
pub const MAX_BYZANTINE_MAX: u16 = 100;
/// Bytes of a raw prompt, and of a chat's messages.
pub const PROMPT_BYTES_MAX: usize = 8 << 20;
/// Tokens of a prompt, and tokens of an answer.
pub const TOKENS_MAX: usize = 1 << 20;
/// Values of an input or output vector.
pub const VALUES_MAX: usize = 4 << 20;
/// Stop strings of a request.
pub const STOPS_MAX: usize = 16;
/// Bytes of one stop string.
pub const STOP_BYTES_MAX: usize = 1024;
/// Entries of a request's logit bias.
pub const LOGIT_BIAS_MAX: usize = 1024;
/// Log-probabilities asked for at each position, beside that of the chosen token.
pub const LOGPROBS_MAX: u8 = 20;
/// Milliseconds between a request's `now` and its expiry.
pub const EXPIRY_MS_MAX: u64 = 600_000;
/// Bytes of an answer's text.
pub const ANSWER_TEXT_BYTES_MAX: usize = 16 << 20;
/// Bytes of an encoded request.
pub const REQUEST_BYTES_MAX: usize = 20 << 20;
/// Bytes of an encoded answer.
pub const ANSWER_BYTES_MAX: usize = 24 << 20;
/// Items under one signature.
pub const BATCH_ITEMS_MAX: usize = 1024;
/// Bytes of a batch as it travels.
pub const BATCH_BYTES_MAX: usize = 64 << 20;
/// Bytes of JSON read for an epoch, a receipt, a request, an answer or evidence.
pub const JSON_BYTES_MAX: usize = 128 << 20;

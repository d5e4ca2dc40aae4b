//! The rules of the protocol that the tests of this crate can switch off, one at a time.
//!
//! A test that passes with a rule switched off does not test it. In every other build [`Rules`] has no field, and asking
//! whether a rule holds is the constant `true`: nothing outside this crate's tests can weaken the protocol.

/// One rule that makes a certificate, a receipt or evidence worth believing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Rule {
    /// A slice needs f+1 votes.
    Threshold,
    /// What is signed names its purpose.
    Purpose,
    /// What is signed names its epoch.
    Epoch,
    /// Boundary 0 equals what the request and the answer give.
    Boundary0,
    /// The output root of a slice is the input root of the next.
    Chain,
    /// Only the replica set of a slice votes on it.
    Membership,
    /// A node counts once.
    Distinct,
    /// Votes cover the positions that the request and the answer give.
    Positions,
    /// The answer's root is the last output root.
    AnswerRoot,
    /// The signature is the low-S one of its pair.
    LowS,
    /// The vote is the leaf that the path starts from.
    Leaf,
    /// A batch is signed by the node that sent it.
    Sender,
    /// A vote counts for the request it names.
    Request,
    /// A vote counts for the slice it names.
    Slice,
    /// The signature verifies.
    Signature,
    /// A work tag is bound to the node that made it.
    TagNode,
}

/// The rules in force.
#[cfg(not(test))]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Rules;

#[cfg(not(test))]
impl Rules {
    /// Every rule.
    pub(crate) const ALL: Self = Self;

    /// Whether the rule holds: always.
    pub(crate) const fn hold(self, _rule: Rule) -> bool {
        true
    }
}

/// The rules in force: all but at most one.
#[cfg(test)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Rules {
    without: Option<Rule>,
}

#[cfg(test)]
impl Rules {
    /// Every rule.
    pub(crate) const ALL: Self = Self { without: None };

    /// Every rule but one: a planted bug.
    pub(crate) const fn without(rule: Rule) -> Self {
        Self { without: Some(rule) }
    }

    /// Whether the rule holds.
    pub(crate) fn hold(self, rule: Rule) -> bool {
        self.without != Some(rule)
    }
}

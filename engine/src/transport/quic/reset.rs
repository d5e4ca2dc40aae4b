//! How a restarted node makes its peers notice at once: reset tokens that outlive the process.
//!
//! A packet of a connection that this process does not know is answered with a token that only this node can make, so
//! that the peer drops the connection instead of waiting for its idle timeout. The key derives from the identity key.
//!
//! It refuses to know connections.

use std::sync::Arc;
use std::time::Duration;

use quinn::crypto::{CryptoError, HmacKey};
use quinn::{ConnectionId, ConnectionIdGenerator, EndpointConfig};
use sha2::{Digest, Sha256};

/// An endpoint's configuration whose reset tokens derive from `secret`.
pub(super) fn endpoint_config(secret: [u8; 32]) -> EndpointConfig {
    let mut config = EndpointConfig::new(Arc::new(ResetKey(secret)));
    config.cid_generator(|| -> Box<dyn ConnectionIdGenerator> { Box::new(RandomIds) });
    config
}

/// Connection ids that cannot be told from those of another process, so that theirs are answered too. The endpoint limits
/// how often it answers.
struct RandomIds;

const ID_BYTES: usize = 8;

impl ConnectionIdGenerator for RandomIds {
    fn generate_cid(&mut self) -> ConnectionId {
        let mut id = [0; ID_BYTES];
        // Without randomness ids collide and no connection comes about, for which the handshake has its own error.
        let _ = getrandom::fill(&mut id);
        ConnectionId::new(&id)
    }

    fn cid_len(&self) -> usize {
        ID_BYTES
    }

    fn cid_lifetime(&self) -> Option<Duration> {
        None
    }
}

/// Makes reset tokens. What is signed has one length, and only half of the digest is shown, so a keyed hash will do.
struct ResetKey([u8; 32]);

const SIGNATURE_BYTES: usize = 16;

impl ResetKey {
    fn of(&self, data: &[u8]) -> [u8; SIGNATURE_BYTES] {
        let digest: [u8; 32] = Sha256::new().chain_update(self.0).chain_update(data).finalize().into();
        digest.first_chunk().copied().unwrap_or_default()
    }
}

impl HmacKey for ResetKey {
    fn sign(&self, data: &[u8], signature_out: &mut [u8]) {
        for (out, byte) in signature_out.iter_mut().zip(self.of(data)) {
            *out = byte;
        }
    }

    fn signature_len(&self) -> usize {
        SIGNATURE_BYTES
    }

    fn verify(&self, data: &[u8], signature: &[u8]) -> Result<(), CryptoError> {
        if self.of(data) == signature { Ok(()) } else { Err(CryptoError) }
    }
}

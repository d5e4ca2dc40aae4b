//! A peer made by hand from the description of the protocol, to say what no correct peer says.

use std::net::SocketAddr;
use std::sync::Arc;

use butterfly_topology::NodeId;
use k256::ecdsa::signature::hazmat::PrehashSigner;
use k256::ecdsa::{Signature, SigningKey};
use quinn::crypto::rustls::QuicClientConfig;
use quinn::{ClientConfig, Connection, ConnectionError, Endpoint, RecvStream, SendStream};
use rcgen::PublicKeyData;
use rustls::client::AlwaysResolvesClientRawPublicKeys;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName, UnixTime};
use rustls::sign::CertifiedKey;
use rustls::{DigitallySignedStruct, Error, SignatureScheme};
use sha2::{Digest, Sha256};

#[derive(Debug)]
struct Trusting;

impl ServerCertVerifier for Trusting {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ED25519]
    }

    fn requires_raw_public_keys(&self) -> bool {
        true
    }
}

/// How the encryption layer of the peer is set up.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Encryption {
    Proper,
    /// It shows no key of its own.
    Keyless,
    /// It wants another application.
    OtherApplication,
}

pub(super) fn endpoint(encryption: Encryption) -> Endpoint {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let pair = rcgen::KeyPair::generate_for(&rcgen::PKCS_ED25519).unwrap();
    let secret = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(pair.serialize_der()));
    let signing = provider.key_provider.load_private_key(secret).unwrap();
    let public = CertificateDer::from(pair.subject_public_key_info());
    let builder = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Trusting));
    let mut config = match encryption {
        Encryption::Keyless => builder.with_no_client_auth(),
        _ => builder.with_client_cert_resolver(Arc::new(AlwaysResolvesClientRawPublicKeys::new(Arc::new(
            CertifiedKey::new(vec![public], signing),
        )))),
    };
    let application: &[u8] = if encryption == Encryption::OtherApplication { b"h3" } else { b"butterfly/1" };
    config.alpn_protocols = vec![application.to_vec()];
    let mut endpoint = Endpoint::client("127.0.0.1:0".parse().unwrap()).unwrap();
    endpoint.set_default_client_config(ClientConfig::new(Arc::new(QuicClientConfig::try_from(config).unwrap())));
    endpoint
}

pub(super) async fn connect(endpoint: &Endpoint, address: SocketAddr) -> Result<Connection, ConnectionError> {
    endpoint.connect(address, "anything").unwrap().await
}

pub(super) struct Hello<'a> {
    pub(super) from: &'a str,
    pub(super) to: &'a str,
    pub(super) epoch: [u8; 32],
    pub(super) key: [u8; 32],
}

impl Hello<'_> {
    pub(super) fn bytes(&self, connection: &Connection) -> Vec<u8> {
        let mut exporter = [0; 32];
        connection.export_keying_material(&mut exporter, b"EXPORTER-butterfly-link-v1", &[]).unwrap();
        let incarnation = 77_u64;
        let mut digest = Sha256::new();
        digest.update(b"butterfly-link-v1");
        digest.update([1]);
        digest.update(self.epoch);
        digest.update(exporter);
        digest.update(incarnation.to_le_bytes());
        for name in [self.from, self.to] {
            digest.update((name.len() as u64).to_le_bytes());
            digest.update(name);
        }
        let digest: [u8; 32] = digest.finalize().into();
        let signature: Signature = SigningKey::from_slice(&self.key).unwrap().sign_prehash(&digest).unwrap();
        let mut hello = Vec::new();
        hello.extend_from_slice(&1_u16.to_le_bytes());
        hello.push(1);
        hello.extend_from_slice(&self.epoch);
        hello.extend_from_slice(&incarnation.to_le_bytes());
        for name in [self.from, self.to] {
            hello.push(u8::try_from(name.len()).unwrap());
            hello.extend_from_slice(name.as_bytes());
        }
        hello.extend_from_slice(&signature.to_bytes());
        [&u16::try_from(hello.len()).unwrap().to_le_bytes()[..], &hello].concat()
    }
}

/// Connects and is welcomed as a member: the connection and the stream of messages.
pub(super) async fn welcomed(
    endpoint: &Endpoint,
    address: SocketAddr,
    hello: &Hello<'_>,
) -> (Connection, SendStream, RecvStream) {
    let connection = connect(endpoint, address).await.unwrap();
    let (mut send, mut receive) = connection.open_bi().await.unwrap();
    send.write_all(&hello.bytes(&connection)).await.unwrap();
    let mut length = [0; 2];
    receive.read_exact(&mut length).await.unwrap();
    let mut welcome = vec![0; usize::from(u16::from_le_bytes(length))];
    receive.read_exact(&mut welcome).await.unwrap();
    (connection, send, receive)
}

/// The code with which the other end closed the connection.
pub(super) async fn closed_with(connection: &Connection) -> u64 {
    match connection.closed().await {
        ConnectionError::ApplicationClosed(close) => close.error_code.into_inner(),
        other => panic!("{other}"),
    }
}

/// A frame header with these fields.
pub(super) fn header(kind: u8, lane: u16, meta_bytes: u32, payload_bytes: u64, sequence: u64) -> Vec<u8> {
    let mut header = vec![0; 64];
    header[..4].copy_from_slice(b"bfly");
    header[4] = 1;
    header[6] = kind;
    header[8..10].copy_from_slice(&lane.to_le_bytes());
    header[12..16].copy_from_slice(&meta_bytes.to_le_bytes());
    header[16..24].copy_from_slice(&payload_bytes.to_le_bytes());
    header[24..32].copy_from_slice(&sequence.to_le_bytes());
    header
}

/// A message with its length.
pub(super) fn message(parts: &[&[u8]]) -> Vec<u8> {
    let body = parts.concat();
    [&u16::try_from(body.len()).unwrap().to_le_bytes()[..], &body].concat()
}

/// The message that opens the lane `name` under `number`.
pub(super) fn open(number: u16, name: &str, items: u64, bytes: u64) -> Vec<u8> {
    let totals = [items.to_le_bytes(), bytes.to_le_bytes()].concat();
    message(&[&[1], &number.to_le_bytes(), &totals, &totals, name.as_bytes()])
}

pub(super) fn seed_of(name: &NodeId) -> [u8; 32] {
    [name.as_str().bytes().next_back().unwrap(); 32]
}

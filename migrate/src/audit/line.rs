//! One line of the log: made, signed, and taken apart again.
use ring::digest::{SHA256, digest};
use ring::signature::{ED25519, Ed25519KeyPair, KeyPair, UnparsedPublicKey};
use serde::{Deserialize, Serialize, Serializer};

use super::MAX_TEXT_BYTES;
use crate::text::{cut, hex};

/// Longest line without its newline, bytes. Far above what the bounded fields of an event can make.
pub const MAX_LINE_BYTES: usize = 65_536;

const LINE_DOMAIN: &[u8] = b"ferry audit 1\n";
const HEAD_DOMAIN: &[u8] = b"ferry audit head 1\n";
/// `prev` of the first line of all.
pub(super) const GENESIS: [u8; 32] = [0; 32];
const SIGNATURE_FIELD: &str = ",\"sig\":\"";
const SIGNATURE_HEX: usize = 128;

/// Where a log stands: number and SHA-256 of its last line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Head {
    /// Number of the last line; 0 before the first.
    pub sequence: u64,
    /// SHA-256 of the last line without its newline; zeros before the first.
    pub hash: [u8; 32],
}

impl Head {
    pub(super) const EMPTY: Self = Self { sequence: 0, hash: GENESIS };
}

impl Serialize for Head {
    /// As `NUMBER:HASH`.
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&format_args!("{}:{}", self.sequence, hex(&self.hash)))
    }
}

/// Half of a public key's name: what lines refer to it by.
pub(super) fn key_id(public: &[u8]) -> String {
    let hash = digest(&SHA256, public);
    hex(hash.as_ref().get(..8).unwrap_or_default())
}

pub(super) fn hash(line: &[u8]) -> [u8; 32] {
    digest(&SHA256, line).as_ref().try_into().unwrap_or(GENESIS)
}

/// The parts that every line has, before the event's.
#[derive(Serialize)]
struct Envelope<'a, E> {
    seq: u64,
    time: String,
    prev: String,
    key: &'a str,
    host: &'a str,
    #[serde(flatten)]
    event: &'a E,
}

/// A signed line without its newline.
pub(super) fn make<E: Serialize>(
    head: Head,
    sequence: u64,
    now_ms: u64,
    host: &str,
    key: &Ed25519KeyPair,
    event: &E,
) -> Option<String> {
    let id = key_id(key.public_key().as_ref());
    let envelope = Envelope {
        seq: sequence,
        time: timestamp(now_ms),
        prev: hex(&head.hash),
        key: &id,
        host: cut(host, MAX_TEXT_BYTES),
        event,
    };
    let mut text = serde_json::to_string(&envelope).ok()?;
    // The closing brace makes room for the signature.
    text.pop();
    let signature = key.sign(&[LINE_DOMAIN, text.as_bytes()].concat());
    text.push_str(SIGNATURE_FIELD);
    text.push_str(&hex(signature.as_ref()));
    text.push_str("\"}");
    Some(text)
}

/// What a reader needs of a line, whatever the event.
#[derive(Deserialize)]
pub(super) struct Fields {
    pub seq: u64,
    pub prev: String,
    pub key: String,
    pub event: String,
    /// Of `key_changed`: the new public key, hexadecimal.
    #[serde(default)]
    pub new_key: Option<String>,
    /// Of `pruned`: the last number that was removed.
    #[serde(default)]
    pub through: Option<u64>,
    /// Of `lost`: how many lines are missing.
    #[serde(default)]
    pub count: Option<u64>,
}

/// A line taken apart; nothing is verified yet.
pub(super) struct Parsed<'a> {
    pub fields: Fields,
    signed: &'a [u8],
    signature: Vec<u8>,
}

/// Takes a line (without newline) apart. None: not a line of a log.
pub(super) fn parse(line: &[u8]) -> Option<Parsed<'_>> {
    if line.len() > MAX_LINE_BYTES {
        return None;
    }
    let split = line.len().checked_sub(SIGNATURE_FIELD.len() + SIGNATURE_HEX + 2)?;
    let (signed, rest) = line.split_at_checked(split)?;
    let rest = rest.strip_prefix(SIGNATURE_FIELD.as_bytes())?.strip_suffix(b"\"}")?;
    let signature = unhex(std::str::from_utf8(rest).ok()?)?;
    Some(Parsed { fields: serde_json::from_slice(line).ok()?, signed, signature })
}

impl Parsed<'_> {
    pub(super) fn is_signed_by(&self, public: &[u8]) -> bool {
        verify(public, &[LINE_DOMAIN, self.signed].concat(), &self.signature)
    }
}

fn verify(public: &[u8], message: &[u8], signature: &[u8]) -> bool {
    UnparsedPublicKey::new(&ED25519, public).verify(message, signature).is_ok()
}

#[derive(Serialize, Deserialize)]
struct HeadText {
    /// As text of fixed length, so that the file never changes its size.
    seq: String,
    hash: String,
    sig: String,
}

/// Content of `PATH.head`, always of the same length.
pub(super) fn head_text(head: Head, key: &Ed25519KeyPair) -> Option<String> {
    let sig = hex(key.sign(&head_message(head)).as_ref());
    let text = HeadText { seq: format!("{:020}", head.sequence), hash: hex(&head.hash), sig };
    Some(serde_json::to_string(&text).ok()? + "\n")
}

/// Reads `PATH.head`, signed by one of `keys`.
pub(super) fn parse_head<'k>(text: &[u8], mut keys: impl Iterator<Item = &'k [u8]>) -> Option<Head> {
    let text: HeadText = serde_json::from_slice(text).ok()?;
    let head = Head { sequence: text.seq.parse().ok()?, hash: unhex(&text.hash)?.try_into().ok()? };
    let signature = unhex(&text.sig)?;
    keys.any(|key| verify(key, &head_message(head), &signature)).then_some(head)
}

fn head_message(head: Head) -> Vec<u8> {
    [HEAD_DOMAIN, &head.sequence.to_be_bytes(), &head.hash].concat()
}

/// Bytes of lower-case hexadecimal text: one spelling only, so that no second line can mean the same.
pub(super) fn unhex(text: &str) -> Option<Vec<u8>> {
    if !text.len().is_multiple_of(2) || !text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b)) {
        return None;
    }
    (0..text.len()).step_by(2).map(|i| u8::from_str_radix(text.get(i..i + 2)?, 16).ok()).collect()
}

/// RFC 3339 with milliseconds, UTC.
fn timestamp(now_ms: u64) -> String {
    let at = time::OffsetDateTime::from_unix_timestamp_nanos(i128::from(now_ms) * 1_000_000)
        .unwrap_or(time::OffsetDateTime::UNIX_EPOCH);
    format!(
        "{:04}-{:02}-{:02}T{:02}:{:02}:{:02}.{:03}Z",
        at.year(),
        u8::from(at.month()),
        at.day(),
        at.hour(),
        at.minute(),
        at.second(),
        at.millisecond()
    )
}

/// Texts may come from a peer: their length is bounded here, and JSON escapes the rest.
pub(super) fn bounded<S: Serializer>(text: &Option<String>, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(cut(text.as_deref().unwrap_or_default(), MAX_TEXT_BYTES))
}

pub(super) fn migration_id<S: Serializer>(id: &Option<u128>, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&format_args!("{:032x}", id.unwrap_or_default()))
}

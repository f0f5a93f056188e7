//! Writing the log.
use std::ffi::OsString;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ring::signature::{Ed25519KeyPair, KeyPair};
use serde::Serialize;

use super::line::{self, Head, MAX_LINE_BYTES};
use super::{AuditError, Event};
use crate::text::hex;

/// When lines must have reached the disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SyncPolicy {
    /// Before the call that writes a line returns. A power failure loses nothing that was acted upon.
    #[default]
    EachLine,
    /// When the system sees fit. A power failure may lose the last seconds, which shows as missing lines.
    Never,
}

/// May migrations begin when the log cannot be written?
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnFailure {
    /// No. Those under way go on.
    #[default]
    Refuse,
    /// Yes; missing lines are counted.
    Allow,
}

/// Where and how a log is written.
#[derive(Clone, Debug)]
pub struct AuditConfig {
    /// The file; its directory must exist.
    pub path: PathBuf,
    /// Size at which a new file is begun, bytes.
    pub max_file_bytes: u64,
    /// How many full files are kept besides the current one; none: all.
    pub keep_files: Option<usize>,
    /// When lines must have reached the disk.
    pub sync: SyncPolicy,
    /// May migrations begin when the log cannot be written?
    pub on_failure: OnFailure,
}

impl AuditConfig {
    /// 16 MiB per file, all files kept, synchronous, no migration without a log.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            max_file_bytes: 16 << 20,
            keep_files: None,
            sync: SyncPolicy::default(),
            on_failure: OnFailure::default(),
        }
    }
}

/// What was found when a log was opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Opened {
    /// Where it stood.
    pub head: Head,
    /// Bytes of a line that was never finished (crash while writing); removed.
    pub torn_bytes: u64,
    /// Lines that `PATH.head` knows of but the file lacks: cut off, or lost in a power failure.
    pub missing_lines: u64,
    /// `PATH.head` was absent or not signed by this key: what is missing cannot be told.
    pub head_unusable: bool,
}

/// Figures of a log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct AuditStatus {
    /// Number of the last line.
    pub sequence: u64,
    /// Size of the current file, bytes.
    pub file_bytes: u64,
    /// Lines that could not be written since the log was opened.
    pub lost_lines: u64,
    /// Failures to begin a new file, to remove an old one, or to write `PATH.head`, since the log was opened.
    pub upkeep_failures: u64,
    /// Why the last line could not be written; none when it could.
    pub failing: Option<String>,
}

/// What is written of a file; tests put a full disk in its place.
pub(super) trait Store: Send {
    fn append(&mut self, bytes: &[u8]) -> io::Result<()>;
    fn cut(&mut self, len: u64) -> io::Result<()>;
    fn sync(&mut self) -> io::Result<()>;
}

impl Store for File {
    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.write_all(bytes)
    }

    fn cut(&mut self, len: u64) -> io::Result<()> {
        self.set_len(len)
    }

    fn sync(&mut self) -> io::Result<()> {
        self.sync_data()
    }
}

/// An open log. One process at a time.
pub struct AuditLog {
    config: AuditConfig,
    host: String,
    key: Arc<Ed25519KeyPair>,
    pub(super) file: Box<dyn Store>,
    head_file: Option<File>,
    _lock: File,
    head: Head,
    /// Number of the current file's first line, once it has one.
    first: Option<u64>,
    len: u64,
    /// The file may end in part of a line that could not be cut off.
    torn: bool,
    /// Lines that are missing and not yet reported in the log.
    unreported: u64,
    lost_lines: u64,
    upkeep_failures: u64,
    failing: Option<String>,
}

/// Lines that the log writes about itself.
#[derive(Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
enum Own {
    Opened {
        torn_bytes: u64,
        missing_lines: u64,
        head_unusable: bool,
    },
    Lost {
        count: u64,
    },
    /// Old files up to this number are removed next.
    Pruned {
        through: u64,
    },
    /// Lines after this one are signed with another key.
    KeyChanged {
        new_key: String,
    },
}

impl AuditLog {
    /// Opens or begins a log; `host` is written into every line. The first line says that and how it was opened. A disk that is full
    /// is no error here but shows in [`Self::status`].
    ///
    /// # Errors
    /// When the file cannot be opened, is open to other writers, is in use, or does not end like a log.
    pub fn open(
        config: AuditConfig,
        host: &str,
        key: Arc<Ed25519KeyPair>,
        now_ms: u64,
    ) -> Result<(Self, Opened), AuditError> {
        let path = config.path.clone();
        let lock = open_private(&suffixed(&path, ".lock"))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(AuditError::Busy { path }),
            Err(TryLockError::Error(source)) => return Err(AuditError::Io { path, action: "lock", source }),
        }
        let mut file = open_private(&path)?;
        let tail = read_tail(&path, &mut file)?;
        if tail.torn_bytes > 0 {
            file.set_len(tail.len).map_err(|source| AuditError::Io {
                path: path.clone(),
                action: "remove an unfinished line",
                source,
            })?;
        }
        let mut head = tail.head;
        if head.sequence == 0
            && let Some((_, full)) = full_files(&path)?.last()
        {
            head = read_tail(full, &mut open_private(full)?)?.head;
        }
        let first = if tail.len > 0 { first_sequence(&path)? } else { None };
        let head_path = suffixed(&path, ".head");
        let known = fs::read(&head_path)
            .ok()
            .and_then(|text| line::parse_head(&text, std::iter::once(key.public_key().as_ref())));
        let head_unusable = known.is_none() && head.sequence > 0;
        let missing_lines = known.map_or(0, |known| known.sequence.saturating_sub(head.sequence));
        let opened = Opened { head, torn_bytes: tail.torn_bytes, missing_lines, head_unusable };
        if let Some(known) = known
            && missing_lines > 0
        {
            // Going on from what was there keeps the gap visible for ever.
            head = known;
        }
        let head_file = open_private(&head_path).ok();
        let mut log = Self {
            upkeep_failures: u64::from(head_file.is_none()),
            config,
            host: host.to_owned(),
            key,
            file: Box::new(file),
            head_file,
            _lock: lock,
            head,
            first,
            len: tail.len,
            torn: false,
            unreported: 0,
            lost_lines: 0,
            failing: None,
        };
        let own = Own::Opened { torn_bytes: opened.torn_bytes, missing_lines, head_unusable };
        // A failure is kept in the status; it must not keep the switch from forwarding.
        let _ = log.write(now_ms, &own);
        Ok((log, opened))
    }

    /// Writes an event; `now_ms` since 1970 UTC.
    ///
    /// # Errors
    /// When it could not be written. It is counted then, and the log will say that lines are missing.
    pub fn append(&mut self, now_ms: u64, event: &Event) -> Result<Head, AuditError> {
        self.write(now_ms, event)
    }

    /// Writes the event that a migration begins with.
    ///
    /// # Errors
    /// When it could not be written and migrations must not begin without a log ([`OnFailure::Refuse`]).
    pub fn begin(&mut self, now_ms: u64, event: &Event) -> Result<(), AuditError> {
        match (self.write(now_ms, event), self.config.on_failure) {
            (Err(error), OnFailure::Refuse) => Err(error),
            _ => Ok(()),
        }
    }

    /// Signs with another key from now on. A line signed with the old one says so, so that who trusts the old one trusts the new one.
    ///
    /// # Errors
    /// When that line could not be written; the old key stays then.
    pub fn change_key(&mut self, now_ms: u64, key: Arc<Ed25519KeyPair>) -> Result<(), AuditError> {
        if key.public_key().as_ref() == self.key.public_key().as_ref() {
            return Ok(());
        }
        self.write(now_ms, &Own::KeyChanged { new_key: hex(key.public_key().as_ref()) })?;
        self.key = key;
        self.write_head();
        Ok(())
    }

    /// Where the log stands.
    pub fn head(&self) -> Head {
        self.head
    }

    /// Figures for operators.
    pub fn status(&self) -> AuditStatus {
        AuditStatus {
            sequence: self.head.sequence,
            file_bytes: self.len,
            lost_lines: self.lost_lines,
            upkeep_failures: self.upkeep_failures,
            failing: self.failing.clone(),
        }
    }

    fn write<E: Serialize>(&mut self, now_ms: u64, event: &E) -> Result<Head, AuditError> {
        self.turn_over(now_ms);
        let written = self.report_missing(now_ms).and_then(|()| self.put(now_ms, event));
        match written {
            Ok(()) => {
                self.failing = None;
                self.write_head();
                Ok(self.head)
            }
            Err(source) => {
                self.lost_lines += 1;
                self.unreported += 1;
                let error = AuditError::Io { path: self.config.path.clone(), action: "append", source };
                self.failing = Some(error.to_string());
                Err(error)
            }
        }
    }

    fn report_missing(&mut self, now_ms: u64) -> io::Result<()> {
        if self.unreported > 0 {
            self.put(now_ms, &Own::Lost { count: self.unreported })?;
            self.unreported = 0;
        }
        Ok(())
    }

    /// Writes one line, wholly or not at all.
    fn put<E: Serialize>(&mut self, now_ms: u64, event: &E) -> io::Result<()> {
        if self.torn {
            self.file.cut(self.len)?;
            self.torn = false;
        }
        let sequence = self.head.sequence.checked_add(1).ok_or_else(|| io::Error::other("no number is left"))?;
        let mut text = line::make(self.head, sequence, now_ms, &self.host, &self.key, event)
            .ok_or_else(|| io::Error::other("the event has no JSON form"))?;
        if text.len() > MAX_LINE_BYTES {
            return Err(io::Error::other("the line is too long"));
        }
        let hash = line::hash(text.as_bytes());
        text.push('\n');
        let mut written = self.file.append(text.as_bytes());
        if written.is_ok() && self.config.sync == SyncPolicy::EachLine {
            written = self.file.sync();
        }
        if let Err(error) = written {
            self.torn = self.file.cut(self.len).is_err();
            return Err(error);
        }
        self.len += text.len() as u64;
        self.head = Head { sequence, hash };
        self.first.get_or_insert(sequence);
        Ok(())
    }

    /// After the line, never before: it must not know of lines that are not there.
    fn write_head(&mut self) {
        let written = match (&self.head_file, line::head_text(self.head, &self.key)) {
            (Some(file), Some(text)) => file.write_all_at(text.as_bytes(), 0),
            _ => Err(io::Error::other("not open")),
        };
        self.upkeep_failures += u64::from(written.is_err());
    }

    /// Begins a new file when the current one is full, and removes the oldest. When that fails, the current one goes on to be used.
    fn turn_over(&mut self, now_ms: u64) {
        let Some(first) = self.first.filter(|_| self.len >= self.config.max_file_bytes && !self.torn) else { return };
        match self.begin_file(first) {
            Ok(file) => {
                self.file = Box::new(file);
                self.len = 0;
                self.first = None;
                self.prune(now_ms);
            }
            Err(_) => self.upkeep_failures += 1,
        }
    }

    fn begin_file(&self, first: u64) -> io::Result<File> {
        let path = &self.config.path;
        let full = suffixed(path, &format!(".{first:020}"));
        if full.exists() {
            return Err(io::Error::from(io::ErrorKind::AlreadyExists));
        }
        let new_path = suffixed(path, ".new");
        let _ = fs::remove_file(&new_path);
        let new = OpenOptions::new().append(true).create_new(true).mode(0o600).open(&new_path)?;
        fs::rename(path, &full)?;
        if let Err(error) = fs::rename(&new_path, path) {
            // Undone, so that the current file keeps its name.
            fs::rename(&full, path)?;
            return Err(error);
        }
        if let Some(directory) = path.parent().filter(|d| !d.as_os_str().is_empty()) {
            File::open(directory)?.sync_all()?;
        }
        Ok(new)
    }

    fn prune(&mut self, now_ms: u64) {
        let Some(keep) = self.config.keep_files else { return };
        let Ok(full) = full_files(&self.config.path) else {
            self.upkeep_failures += 1;
            return;
        };
        let remove = full.len().saturating_sub(keep);
        // The last number of the files to go: the next file's first, less one.
        let next = full.get(remove).map_or(self.head.sequence.saturating_add(1), |(first, _)| *first);
        if remove == 0 || self.put(now_ms, &Own::Pruned { through: next.saturating_sub(1) }).is_err() {
            return;
        }
        for (_, path) in full.iter().take(remove) {
            self.upkeep_failures += u64::from(fs::remove_file(path).is_err());
        }
    }
}

pub(super) fn suffixed(path: &Path, suffix: &str) -> PathBuf {
    let mut name: OsString = path.as_os_str().to_owned();
    name.push(suffix);
    PathBuf::from(name)
}

/// Full files of a log, oldest first, with the numbers of their first lines.
pub(super) fn full_files(path: &Path) -> Result<Vec<(u64, PathBuf)>, AuditError> {
    let error = |source| AuditError::Io { path: path.to_owned(), action: "list the directory", source };
    let directory = path.parent().filter(|d| !d.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let prefix = format!("{}.", path.file_name().unwrap_or_default().to_string_lossy());
    let mut files = Vec::new();
    for entry in fs::read_dir(directory).map_err(error)? {
        let entry = entry.map_err(error)?;
        let name = entry.file_name();
        let number = name.to_str().and_then(|name| name.strip_prefix(&prefix));
        if let Some(number) = number.filter(|n| n.len() == 20).and_then(|n| n.parse().ok()) {
            files.push((number, entry.path()));
        }
    }
    files.sort();
    Ok(files)
}

fn open_private(path: &Path) -> Result<File, AuditError> {
    let io = |action| move |source| AuditError::Io { path: path.to_owned(), action, source };
    // O_APPEND would put the head file's text behind the old one: positioned writes need a plain file.
    let append = path.extension().is_none_or(|e| e != "head");
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .append(append)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .custom_flags(nix::libc::O_NOFOLLOW)
        .open(path)
        .map_err(io("open"))?;
    let metadata = file.metadata().map_err(io("examine"))?;
    if !metadata.is_file() {
        return Err(AuditError::Content { path: path.to_owned(), problem: "is not a regular file".into() });
    }
    if metadata.mode() & 0o022 != 0 {
        return Err(AuditError::Content {
            path: path.to_owned(),
            problem: format!(
                "others than its owner may write it (mode {:04o}); run: chmod 0600 {}",
                metadata.mode() & 0o7777,
                path.display()
            ),
        });
    }
    Ok(file)
}

struct Tail {
    head: Head,
    /// Length of the whole lines.
    len: u64,
    torn_bytes: u64,
}

/// Finds the last whole line of a file.
fn read_tail(path: &Path, file: &mut File) -> Result<Tail, AuditError> {
    let io = |source| AuditError::Io { path: path.to_owned(), action: "read", source };
    let content = |problem: &str| AuditError::Content {
        path: path.to_owned(),
        problem: format!("{problem}; move it away to begin a new log, and keep it for `verify`"),
    };
    let total = file.metadata().map_err(io)?.len();
    // Room for a whole line and an unfinished one.
    let window = total.min(2 * (MAX_LINE_BYTES as u64 + 1));
    file.seek(SeekFrom::Start(total - window)).map_err(io)?;
    let mut bytes = Vec::new();
    file.take(window).read_to_end(&mut bytes).map_err(io)?;
    let Some(end) = bytes.iter().rposition(|b| *b == b'\n') else {
        // Never cut off what this log has not written: the path may have been mistyped.
        if total > MAX_LINE_BYTES as u64 || !begins_a_line(&bytes) {
            return Err(content("is not an audit log"));
        }
        return Ok(Tail { head: Head::EMPTY, len: 0, torn_bytes: total });
    };
    let (lines, torn) = bytes.split_at_checked(end).unwrap_or_default();
    let torn_bytes = torn.len().saturating_sub(1) as u64;
    let last = lines.rsplit(|b| *b == b'\n').next().unwrap_or_default();
    let parsed = line::parse(last).ok_or_else(|| content("does not end with a line of an audit log"))?;
    if !begins_a_line(torn.get(1..).unwrap_or_default()) {
        return Err(content("has text behind the last line that no audit log has written"));
    }
    Ok(Tail { head: Head { sequence: parsed.fields.seq, hash: line::hash(last) }, len: total - torn_bytes, torn_bytes })
}

/// Could these bytes be the beginning of a line?
fn begins_a_line(bytes: &[u8]) -> bool {
    const START: &[u8] = b"{\"seq\":";
    bytes.iter().zip(START).all(|(a, b)| a == b)
}

fn first_sequence(path: &Path) -> Result<Option<u64>, AuditError> {
    let io = |source| AuditError::Io { path: path.to_owned(), action: "read", source };
    let mut bytes = Vec::new();
    File::open(path).map_err(io)?.take(MAX_LINE_BYTES as u64 + 1).read_to_end(&mut bytes).map_err(io)?;
    let first = bytes.split(|b| *b == b'\n').next().unwrap_or_default();
    Ok(line::parse(first).map(|line| line.fields.seq))
}

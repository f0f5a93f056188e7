//! Reading a log as a doubter.
use std::fmt;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, ErrorKind, Read};
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::AuditError;
use super::line::{self, Head, MAX_LINE_BYTES};
use super::log::{full_files, suffixed};

/// Most problems that a report lists; the rest is counted.
pub const MAX_PROBLEMS: usize = 100;

/// What a log turned out to be.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Report {
    /// Files, oldest first.
    pub files: Vec<PathBuf>,
    /// Lines read.
    pub lines: u64,
    /// Number of the first line; above 1 when older files were removed.
    pub first_sequence: Option<u64>,
    /// The last line.
    pub last: Option<Head>,
    /// Lines that the log itself says could not be written.
    pub lost_lines: u64,
    /// What is wrong; nothing: the log is as it was written.
    pub problems: Vec<Problem>,
    /// Problems beyond [`MAX_PROBLEMS`].
    pub more_problems: u64,
}

impl Report {
    /// True when nothing is wrong.
    pub fn is_intact(&self) -> bool {
        self.problems.is_empty()
    }

    fn add(&mut self, file: &Path, line: u64, kind: ProblemKind) {
        if self.problems.len() < MAX_PROBLEMS {
            self.problems.push(Problem { file: file.to_owned(), line, kind });
        } else {
            self.more_problems += 1;
        }
    }
}

/// One thing that is wrong.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Problem {
    /// Where.
    pub file: PathBuf,
    /// Line in the file, from 1; 0: the file as a whole.
    pub line: u64,
    /// What.
    pub kind: ProblemKind,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: {}", self.file.display(), self.line, self.kind)
    }
}

/// What is wrong.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ProblemKind {
    /// Not a line of an audit log.
    Malformed,
    /// Signed by a key that is not among the trusted ones.
    UnknownKey(String),
    /// The signature does not fit: the line was changed.
    Signature,
    /// Number and link do not continue the line before: lines were removed, inserted or moved here.
    Chain {
        /// The number that should have followed.
        expected: u64,
        /// The number that is there.
        found: u64,
    },
    /// The last line is not finished.
    Unfinished,
    /// Lines before the first are missing and no line says that they were removed as configured.
    Beginning {
        /// The first number that is there.
        first: u64,
    },
    /// `PATH.head` knows of more lines: the end was cut off.
    Truncated {
        /// The last number according to it.
        known: u64,
        /// The last number that is there.
        found: u64,
    },
    /// `PATH.head` does not agree with the line of the same number.
    HeadDiffers,
    /// `PATH.head` is absent, unreadable, or not signed by a trusted key.
    HeadUnusable,
}

impl fmt::Display for ProblemKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Malformed => f.write_str("not a line of an audit log"),
            Self::UnknownKey(id) => write!(f, "signed by unknown key {id}"),
            Self::Signature => f.write_str("the signature does not fit: the line was changed"),
            Self::Chain { expected, found } => {
                write!(
                    f,
                    "line {found} does not continue the one before ({expected} expected): removed, inserted or moved"
                )
            }
            Self::Unfinished => f.write_str("the last line is not finished"),
            Self::Beginning { first } => write!(f, "begins at line {first}: older files are missing"),
            Self::Truncated { known, found } => write!(f, "ends at line {found} but {known} were written: cut off"),
            Self::HeadDiffers => f.write_str("the last line is not the one that the head file names"),
            Self::HeadUnusable => f.write_str("the head file is missing or not signed by a trusted key"),
        }
    }
}

/// Checks a log with all its files against the hosts' public keys (Ed25519, 32 bytes each). A key that a trusted key's line announces is trusted from there on.
/// Reads line by line, in bounded memory, and goes on after a problem.
///
/// # Errors
/// Only when files cannot be read; what is wrong with their content is in the report.
pub fn verify(path: &Path, keys: &[[u8; 32]]) -> Result<Report, AuditError> {
    let mut reader = Reader {
        report: Report::default(),
        keys: keys.iter().map(|key| (line::key_id(key), key.to_vec())).collect(),
        before: None,
        pruned_through: 0,
    };
    let mut files: Vec<PathBuf> = full_files(path)?.into_iter().map(|(_, path)| path).collect();
    files.push(path.to_owned());
    for file in &files {
        reader.file(file)?;
    }
    let Reader { mut report, keys, before, pruned_through } = reader;
    if let Some(first) = report.first_sequence.filter(|first| first.saturating_sub(1) > pruned_through) {
        report.add(files.first().map_or(path, PathBuf::as_path), 1, ProblemKind::Beginning { first });
    }
    let head_path = suffixed(path, ".head");
    let known =
        fs::read(&head_path).ok().and_then(|text| line::parse_head(&text, keys.iter().map(|(_, key)| key.as_slice())));
    let found = before.map_or(0, |head| head.sequence);
    match known {
        None => report.add(&head_path, 0, ProblemKind::HeadUnusable),
        Some(known) if known.sequence > found => {
            report.add(path, 0, ProblemKind::Truncated { known: known.sequence, found });
        }
        // One line may be newer than the head file: a crash between the two.
        Some(known) if Some(known) != before && known.sequence == found => {
            report.add(path, 0, ProblemKind::HeadDiffers);
        }
        Some(_) => {}
    }
    report.last = before;
    report.files = files;
    Ok(report)
}

struct Reader {
    report: Report,
    keys: Vec<(String, Vec<u8>)>,
    before: Option<Head>,
    pruned_through: u64,
}

impl Reader {
    fn file(&mut self, path: &Path) -> Result<(), AuditError> {
        let io = |source| AuditError::Io { path: path.to_owned(), action: "read", source };
        let mut file = BufReader::new(File::open(path).map_err(io)?);
        let mut bytes = Vec::new();
        let mut number = 0;
        loop {
            bytes.clear();
            let read = loop {
                match (&mut file).take(MAX_LINE_BYTES as u64 + 2).read_until(b'\n', &mut bytes) {
                    Err(e) if e.kind() == ErrorKind::Interrupted => {}
                    other => break other.map_err(io)?,
                }
            };
            if read == 0 {
                return Ok(());
            }
            number += 1;
            self.report.lines += 1;
            match bytes.strip_suffix(b"\n") {
                Some(line) => self.line(path, number, line),
                None if read > MAX_LINE_BYTES => self.report.add(path, number, ProblemKind::Malformed),
                None => self.report.add(path, number, ProblemKind::Unfinished),
            }
        }
    }

    fn line(&mut self, path: &Path, number: u64, text: &[u8]) {
        let Some(parsed) = line::parse(text) else {
            self.report.add(path, number, ProblemKind::Malformed);
            return;
        };
        let fields = &parsed.fields;
        let here = Head { sequence: fields.seq, hash: line::hash(text) };
        let before = self.before.replace(here);
        let genuine = match self.keys.iter().find(|(id, _)| *id == fields.key) {
            None => {
                self.report.add(path, number, ProblemKind::UnknownKey(fields.key.clone()));
                false
            }
            Some((_, key)) if !parsed.is_signed_by(key) => {
                self.report.add(path, number, ProblemKind::Signature);
                false
            }
            Some(_) => true,
        };
        match before {
            Some(before) => {
                let expected = before.sequence.saturating_add(1);
                let linked = line::unhex(&fields.prev).is_some_and(|prev| prev == before.hash);
                if fields.seq != expected || !linked {
                    self.report.add(path, number, ProblemKind::Chain { expected, found: fields.seq });
                }
            }
            None => {
                self.report.first_sequence = Some(fields.seq);
                if fields.seq <= 1 && (fields.seq == 0 || line::unhex(&fields.prev).as_deref() != Some(&line::GENESIS))
                {
                    self.report.add(path, number, ProblemKind::Chain { expected: 1, found: fields.seq });
                }
            }
        }
        if !genuine {
            return;
        }
        match fields.event.as_str() {
            "lost" => self.report.lost_lines = self.report.lost_lines.saturating_add(fields.count.unwrap_or(0)),
            "pruned" => self.pruned_through = self.pruned_through.max(fields.through.unwrap_or(0)),
            "key_changed" => {
                let key = fields.new_key.as_deref().and_then(line::unhex).filter(|key| key.len() == 32);
                if let Some(key) = key {
                    self.keys.push((line::key_id(&key), key));
                }
            }
            _ => {}
        }
    }
}

//! What is wrong with a configuration, where, and how to put it right.
use std::collections::HashMap;
use std::fmt;
use std::ops::Range;

/// Which part of a key's entry is at fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum At {
    /// The key itself (unknown, not allowed here).
    Key,
    /// Its value.
    Value,
}

/// One thing wrong with a configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Path of the key, e.g. `port[2].vlan.tag`; empty for the document as a whole.
    pub path: String,
    /// Which part of it.
    pub at: At,
    /// What is wrong.
    pub message: String,
    /// What to do about it.
    pub fix: String,
    /// Another place the message speaks of ("first used here").
    pub other: Option<String>,
}

impl Problem {
    /// A problem with the value at `path`.
    pub fn value(path: impl Into<String>, message: impl Into<String>, fix: impl Into<String>) -> Self {
        Self { path: path.into(), at: At::Value, message: message.into(), fix: fix.into(), other: None }
    }

    /// A problem with the key at `path`.
    pub fn key(path: impl Into<String>, message: impl Into<String>, fix: impl Into<String>) -> Self {
        Self { at: At::Key, ..Self::value(path, message, fix) }
    }

    /// Names a second place.
    pub fn with_other(mut self, path: impl Into<String>) -> Self {
        self.other = Some(path.into());
        self
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.path.is_empty() {
            write!(f, "{}: ", self.path)?;
        }
        write!(f, "{}", self.message)?;
        if let Some(other) = &self.other {
            write!(f, " (first at {other})")?;
        }
        Ok(())
    }
}

/// Byte ranges of a key and its value within the file.
#[derive(Clone, Debug, Default)]
pub struct Place {
    /// Where the key is written.
    pub key: Range<usize>,
    /// Where the value is written.
    pub value: Range<usize>,
}

/// A configuration file's text with the place of each key, for messages that name line and column.
#[derive(Clone, Debug, Default)]
pub struct Source {
    /// The file's name as the user gave it.
    pub file: String,
    /// Its text.
    pub text: String,
    /// Places by key path.
    pub places: HashMap<String, Place>,
}

impl Source {
    /// Line and column (both from 1, columns in characters) of a byte offset.
    pub fn position(&self, offset: usize) -> (usize, usize) {
        let mut offset = offset.min(self.text.len());
        while !self.text.is_char_boundary(offset) {
            offset -= 1;
        }
        let before = &self.text[..offset];
        let line = before.matches('\n').count() + 1;
        let start = before.rfind('\n').map_or(0, |i| i + 1);
        (line, before[start..].chars().count() + 1)
    }

    /// Where `path` is written; if it is not (a missing key), its nearest ancestor that is.
    fn place(&self, path: &str, at: At) -> Option<Range<usize>> {
        let mut p = path;
        loop {
            if let Some(place) = self.places.get(p) {
                // A missing key is reported at the head of the table that lacks it.
                return Some(if at == At::Value && p.len() == path.len() {
                    place.value.clone()
                } else {
                    place.key.clone()
                });
            }
            p = match p.rfind(['.', '[']) {
                Some(i) => &p[..i],
                None => return None,
            };
        }
    }

    /// `file:line:column` of a path.
    pub fn location(&self, path: &str, at: At) -> String {
        match self.place(path, at) {
            Some(r) => {
                let (line, col) = self.position(r.start);
                format!("{}:{line}:{col}", self.file)
            }
            None => format!("{}:1:1", self.file),
        }
    }

    /// The problem as the user reads it: place, key, what is wrong, the line, the fix.
    pub fn render(&self, problem: &Problem) -> String {
        let range = self.place(&problem.path, problem.at).unwrap_or(0..0);
        self.render_at(range, problem)
    }

    /// As [`Self::render`], for a range known otherwise (syntax errors).
    pub fn render_at(&self, range: Range<usize>, problem: &Problem) -> String {
        use fmt::Write as _;
        let (line, col) = self.position(range.start);
        let mut out = format!("{}:{line}:{col}: error: ", self.file);
        if !problem.path.is_empty() {
            let _ = write!(out, "{}: ", problem.path);
        }
        out.push_str(&problem.message);
        if let Some(other) = &problem.other {
            let _ = write!(out, " (first at {})", self.location(other, At::Value));
        }
        if let Some(text) = self.text.lines().nth(line - 1).filter(|t| !t.trim().is_empty()) {
            let shown: String = text.chars().take(160).map(|c| if c == '\t' { ' ' } else { c }).collect();
            let room = shown.chars().count().saturating_sub(col - 1).max(1);
            let end = range.end.min(self.text.len());
            let width = self
                .text
                .get(range.start.min(end)..end)
                .map_or(1, |s| s.lines().next().map_or(0, |l| l.chars().count()).clamp(1, room));
            let _ = write!(out, "\n{line:>5} | {shown}\n      | {}{}", " ".repeat(col - 1), "^".repeat(width));
        }
        if !problem.fix.is_empty() {
            let _ = write!(out, "\n  fix: {}", problem.fix);
        }
        out
    }
}

/// A configuration that cannot be used: everything that is wrong with it.
#[derive(Clone, Debug)]
pub struct ConfigError {
    /// The text it came from; without file name for an API request.
    pub source: Box<Source>,
    /// All problems, in the order of the file.
    pub problems: Vec<Problem>,
    /// For a syntax error: where it is.
    pub syntax_at: Option<Range<usize>>,
}

impl ConfigError {
    /// Problems found outside a file.
    pub fn without_file(problems: Vec<Problem>) -> Self {
        Self { source: Box::default(), problems, syntax_at: None }
    }

    /// The messages, one per problem, with places where they are known.
    pub fn messages(&self) -> Vec<String> {
        self.problems
            .iter()
            .map(|p| match &self.syntax_at {
                _ if self.source.file.is_empty() => p.to_string(),
                Some(range) => self.source.render_at(range.clone(), p),
                None => self.source.render(p),
            })
            .collect()
    }

    /// Line and column of a problem, both from 1.
    pub fn position(&self, problem: &Problem) -> (usize, usize) {
        let range = self.syntax_at.clone().or_else(|| self.source.place(&problem.path, problem.at));
        self.source.position(range.map_or(0, |r| r.start))
    }

    /// The first problem's remedy.
    pub fn hint(&self) -> String {
        self.problems.first().map(|p| p.fix.clone()).unwrap_or_default()
    }
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.messages().join("\n"))
    }
}

impl std::error::Error for ConfigError {}

//! Configuration: reading files and API requests, checking them wholly, and saying precisely what is wrong.
//!
//! Text becomes a value tree with the place of every key; the tree is checked against [`schema`]; only then
//! it becomes the typed [`Config`], whose entries are checked against each other ([`check`]).
mod check;
mod firewall;
mod firewall_check;
mod firewall_schema;
mod migration;
mod migration_check;
mod migration_schema;
mod model;
mod problem;
pub mod schema;

use std::path::Path;

use serde_json::{Map, Number, Value};
use toml::Spanned;
use toml::de::{DeArray, DeTable, DeValue};

pub use firewall::*;
pub use migration::*;
pub use model::*;
pub use problem::{At, ConfigError, Place, Problem, Source};

/// Largest configuration file, bytes.
pub const MAX_FILE_BYTES: u64 = 4 << 20;

/// Reads and checks a configuration file.
///
/// # Errors
/// The file cannot be read, or everything that is wrong with it.
pub fn load(path: &Path) -> Result<Config, ConfigError> {
    let file = path.display().to_string();
    let unreadable = |message: String, fix: &str| ConfigError {
        source: Box::default(),
        problems: vec![Problem::value("", format!("{file}: {message}"), fix)],
        syntax_at: None,
    };
    let size =
        std::fs::metadata(path).map_err(|e| unreadable(e.to_string(), "check the path and the permissions"))?.len();
    if size > MAX_FILE_BYTES {
        return Err(unreadable(
            format!("has {size} bytes, at most {MAX_FILE_BYTES} are read"),
            "is it the right file?",
        ));
    }
    let text = std::fs::read_to_string(path)
        .map_err(|e| unreadable(e.to_string(), "check the path, the permissions and that it is UTF-8 text"))?;
    parse(&file, &text)
}

/// Checks the text of a configuration file; `file` is the name used in messages.
///
/// # Errors
/// Everything that is wrong with it.
pub fn parse(file: &str, text: &str) -> Result<Config, ConfigError> {
    let mut source = Source { file: file.to_owned(), text: text.to_owned(), places: Default::default() };
    let document = match DeTable::parse(text) {
        Ok(d) => d,
        Err(e) => {
            let problem = Problem::value("", e.message().trim().replace('\n', "; "), "correct the TOML syntax here");
            return Err(ConfigError {
                source: Box::new(source),
                problems: vec![problem],
                syntax_at: Some(e.span().unwrap_or(0..0)),
            });
        }
    };
    let mut problems = Vec::new();
    let tree = table_to_json(document.get_ref(), "", &mut source, &mut problems);
    let fail = |source: Source, mut problems: Vec<Problem>| {
        problems.sort_by_key(|p| source.place_start(p));
        ConfigError { source: Box::new(source), problems, syntax_at: None }
    };
    if !problems.is_empty() {
        return Err(fail(source, problems));
    }
    from_tree(Value::Object(tree)).map_err(|p| fail(source, p))
}

/// Checks a value tree (of a file or built from an API request) and turns it into a [`Config`].
///
/// # Errors
/// Everything that is wrong with it.
pub fn from_tree(tree: Value) -> Result<Config, Vec<Problem>> {
    let mut problems = Vec::new();
    match &tree {
        Value::Object(map) => schema::check_section(&schema::ROOT, map, "", &mut problems),
        _ => problems.push(Problem::value("", "the configuration must be a table", "")),
    }
    if !problems.is_empty() {
        return Err(problems);
    }
    let config: Config = serde_json::from_value(tree)
        .map_err(|e| vec![Problem::value("", e.to_string(), "see docs/CONFIG.md for the form of each key")])?;
    check::check(&config, &mut problems);
    if problems.is_empty() { Ok(config) } else { Err(problems) }
}

/// The value tree of a configuration, as [`from_tree`] takes it.
pub fn to_tree(config: &Config) -> Value {
    // Serialising plain data with string keys cannot fail.
    serde_json::to_value(config).unwrap_or_default()
}

impl Source {
    fn place_start(&self, problem: &Problem) -> usize {
        let mut path = problem.path.as_str();
        loop {
            if let Some(place) = self.places.get(path) {
                return place.key.start;
            }
            path = match path.rfind(['.', '[']) {
                Some(i) => &path[..i],
                None => return 0,
            };
        }
    }
}

fn table_to_json(
    table: &DeTable<'_>,
    path: &str,
    source: &mut Source,
    problems: &mut Vec<Problem>,
) -> Map<String, Value> {
    let mut out = Map::new();
    for (key, value) in table.iter() {
        let name = key.get_ref().to_string();
        let at = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
        source.places.insert(at.clone(), Place { key: key.span(), value: value.span() });
        let v = value_to_json(value, &at, source, problems);
        out.insert(name, v);
    }
    out
}

fn value_to_json(value: &Spanned<DeValue<'_>>, path: &str, source: &mut Source, problems: &mut Vec<Problem>) -> Value {
    let mut refuse = |what: &str| {
        problems.push(Problem::value(
            path,
            format!("{what} is not used anywhere in this file's keys"),
            "quote it, if a string is meant",
        ));
        Value::Null
    };
    match value.get_ref() {
        DeValue::String(s) => Value::from(s.as_ref()),
        DeValue::Boolean(b) => Value::from(*b),
        DeValue::Integer(i) => match i64::from_str_radix(i.as_str(), i.radix()) {
            Ok(n) => Value::from(n),
            Err(_) => refuse("a number of this size"),
        },
        DeValue::Float(f) => {
            f.as_str().parse().ok().and_then(Number::from_f64).map_or_else(|| refuse("such a number"), Value::Number)
        }
        DeValue::Datetime(_) => refuse("a date or time"),
        DeValue::Array(items) => array_to_json(items, path, source, problems),
        DeValue::Table(table) => Value::Object(table_to_json(table, path, source, problems)),
    }
}

fn array_to_json(items: &DeArray<'_>, path: &str, source: &mut Source, problems: &mut Vec<Problem>) -> Value {
    let each = items.iter().enumerate().map(|(i, item)| {
        let at = format!("{path}[{i}]");
        source.places.insert(at.clone(), Place { key: item.span(), value: item.span() });
        value_to_json(item, &at, source, problems)
    });
    Value::Array(each.collect())
}

//! Aligned tables and colours for people.
use std::io::IsTerminal;

/// True when standard output takes colours.
pub fn colours() -> bool {
    std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty())
}

/// A state, coloured by what it means.
pub fn state(text: &str, colours: bool) -> String {
    let code = match text {
        "up" | "OK" | "ok" | "migrated" => "32",
        "waiting" | "connected" | "disabled" | "warning" | "cancelled" => "33",
        "fault" | "down" | "unknown" | "failed" | "refused" | "problem" => "31",
        _ => return text.to_owned(),
    };
    if colours { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
}

/// A table whose columns are as wide as their widest cell. Numbers stand right.
#[derive(Default)]
pub struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table with these headings.
    pub fn new(headings: &[&str]) -> Self {
        Self { rows: vec![headings.iter().map(|h| (*h).to_owned()).collect()] }
    }

    /// Adds a row.
    pub fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.rows.push(cells.into_iter().collect());
    }

    /// The table as text, each line ended; only headings when there are no rows.
    pub fn render(&self) -> String {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let cell = |row: &Vec<String>, c: usize| row.get(c).cloned().unwrap_or_default();
        let width = |c: usize| self.rows.iter().map(|r| visible(&cell(r, c))).max().unwrap_or(0);
        let widths: Vec<usize> = (0..columns).map(width).collect();
        let numeric: Vec<bool> = (0..columns)
            .map(|c| {
                let mut cells =
                    self.rows.iter().skip(1).map(|r| cell(r, c)).filter(|t| !t.is_empty() && t != "-").peekable();
                cells.peek().is_some() && cells.all(|t| t.starts_with(|c: char| c.is_ascii_digit()) && number(&t))
            })
            .collect();
        let mut out = String::new();
        for row in &self.rows {
            let mut line = String::new();
            for c in 0..columns {
                let text = cell(row, c);
                let pad = " ".repeat(widths[c] - visible(&text));
                if c > 0 {
                    line.push_str("  ");
                }
                line += &if numeric[c] { pad + &text } else { text + &pad };
            }
            out.push_str(line.trim_end());
            out.push('\n');
        }
        out
    }
}

fn number(text: &str) -> bool {
    text.chars().all(|c| c.is_ascii_digit() || matches!(c, '.' | '%' | '/' | 's'))
}

/// Width without colour codes.
fn visible(text: &str) -> usize {
    let mut inside = false;
    text.chars()
        .filter(|c| {
            let shown = !inside && *c != '\x1b';
            inside = if inside { *c != 'm' } else { *c == '\x1b' };
            shown
        })
        .count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned_and_numbers_stand_right() {
        let mut t = Table::new(&["PORT", "FRAMES", "STATE"]);
        t.row(["vm1".into(), "5".into(), state("up", true)]);
        t.row(["uplink".into(), "12345".into(), state("waiting", true)]);
        assert_eq!(
            t.render(),
            "PORT    FRAMES  STATE\nvm1          5  \x1b[32mup\x1b[0m\nuplink   12345  \x1b[33mwaiting\x1b[0m\n"
        );
    }
}

//! What reaches the terminal: JSON lines or aligned tables on stdout, progress on stderr.
//!
//! Nothing here knows a command. Whatever came out of a store is escaped before a terminal sees it.

use std::borrow::Cow;
use std::fmt::Write as _;
use std::io::{self, IsTerminal, Write};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;

/// Where a command writes its answer.
#[derive(Debug)]
pub(crate) struct Output {
    json: bool,
    colour: bool,
}

/// How a piece of text looks on a terminal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Style {
    Plain,
    Bold,
    Dim,
    Good,
    Bad,
}

impl Output {
    pub(crate) fn new(json: bool) -> Self {
        Self { json, colour: !json && io::stdout().is_terminal() && colour_wanted() }
    }

    pub(crate) fn is_json(&self) -> bool {
        self.json
    }

    /// Prints one JSON object as a line.
    pub(crate) fn object(&self, object: &impl Serialize) -> io::Result<()> {
        let text = serde_json::to_string(object)?;
        self.raw(&json_for_terminals(&text))
    }

    /// Prints a line that is safe to print.
    pub(crate) fn raw(&self, line: &str) -> io::Result<()> {
        // Flushed line by line, because whoever waits for a line, as a script does for "held", waits for it now.
        let mut stdout = io::stdout().lock();
        writeln!(stdout, "{line}")?;
        stdout.flush()
    }

    pub(crate) fn paint<'a>(&self, style: Style, text: impl Into<Cow<'a, str>>) -> Cow<'a, str> {
        let text = text.into();
        let code = match style {
            Style::Bold => "1",
            Style::Dim => "2",
            Style::Good => "32",
            Style::Bad => "1;31",
            Style::Plain => return text,
        };
        if self.colour && !text.is_empty() { format!("\u{1b}[{code}m{text}\u{1b}[0m").into() } else { text }
    }

    /// A bar of `length` steps on stderr, for human eyes only: hidden for JSON and away from terminals.
    pub(crate) fn progress(&self, length: u64, template: &str) -> ProgressBar {
        let bar = ProgressBar::with_draw_target(Some(length), ProgressDrawTarget::hidden());
        if !self.json && io::stderr().is_terminal() && colour_wanted() {
            bar.set_draw_target(ProgressDrawTarget::stderr());
            bar.set_style(
                ProgressStyle::with_template(template).expect("the templates are constants").progress_chars("━╸─"),
            );
            bar.enable_steady_tick(Duration::from_millis(100));
        }
        bar
    }
}

fn colour_wanted() -> bool {
    let says = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
    says("NO_COLOR").is_none() && says("TERM").is_none_or(|term| term != "dumb")
}

/// One field of a table.
#[derive(Debug)]
pub(crate) struct Cell {
    text: String,
    style: Style,
}

impl Cell {
    pub(crate) fn new(text: impl AsRef<str>) -> Self {
        Self { text: escape(text.as_ref()), style: Style::Plain }
    }

    pub(crate) fn styled(text: impl AsRef<str>, style: Style) -> Self {
        Self { style, ..Self::new(text) }
    }
}

/// Which side of its column a field keeps to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Align {
    Left,
    Right,
}

/// Rows under headings, each column as wide as its widest field.
#[derive(Debug)]
pub(crate) struct Table {
    columns: Vec<(&'static str, Align, usize)>,
    rows: Vec<Vec<Cell>>,
    headings: bool,
}

impl Table {
    pub(crate) fn new(columns: &[(&'static str, Align)]) -> Self {
        let columns: Vec<_> = columns.iter().map(|&(title, align)| (title, align, title.chars().count())).collect();
        let headings = columns.iter().any(|(title, ..)| !title.is_empty());
        Self { columns, rows: Vec::new(), headings }
    }

    pub(crate) fn row(&mut self, cells: Vec<Cell>) {
        for (cell, (.., width)) in cells.iter().zip(&mut self.columns) {
            *width = (*width).max(cell.text.chars().count());
        }
        self.rows.push(cells);
    }

    /// Makes a column at least `width` wide, for tables that are printed in parts.
    pub(crate) fn widen(&mut self, column: usize, width: usize) {
        let (.., current) = &mut self.columns[column];
        *current = (*current).max(width);
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// Prints the rows added since the last time; the headings only before the first.
    pub(crate) fn print(&mut self, out: &Output) -> io::Result<()> {
        if self.rows.is_empty() {
            return Ok(());
        }
        if std::mem::take(&mut self.headings) {
            let titles: Vec<_> = self.columns.iter().map(|(title, ..)| Cell::styled(title, Style::Dim)).collect();
            out.raw(&self.line(&titles, out))?;
        }
        for row in std::mem::take(&mut self.rows) {
            out.raw(&self.line(&row, out))?;
        }
        Ok(())
    }

    fn line(&self, cells: &[Cell], out: &Output) -> String {
        let mut line = String::from("  ");
        for (n, (cell, (_, align, width))) in cells.iter().zip(&self.columns).enumerate() {
            if n > 0 {
                line.push_str("   ");
            }
            let space = width.saturating_sub(cell.text.chars().count());
            let (before, after) = if *align == Align::Right { (space, 0) } else { (0, space) };
            let _ = write!(line, "{:before$}{}{:after$}", "", out.paint(cell.style, cell.text.as_str()), "");
        }
        line.truncate(line.trim_end().len());
        line
    }
}

/// Makes what came from outside harmless: control characters, and those that turn the direction of text or cannot be seen.
pub(crate) fn escape(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for c in text.chars() {
        if is_harmful(c) {
            safe.extend(c.escape_unicode());
        } else {
            safe.push(c);
        }
    }
    safe
}

/// JSON escapes only what lies below the space; the rest that a terminal could act on is escaped here, still as JSON.
pub(crate) fn json_for_terminals(json: &str) -> String {
    let mut safe = String::with_capacity(json.len());
    for c in json.chars() {
        // Line breaks and tabs are the layout of pretty-printed JSON; inside its strings they are escaped already.
        if is_harmful(c) && !matches!(c, '\n' | '\t') {
            for unit in c.encode_utf16(&mut [0; 2]) {
                let _ = write!(safe, "\\u{unit:04x}");
            }
        } else {
            safe.push(c);
        }
    }
    safe
}

fn is_harmful(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{ad}' | '\u{61c}' | '\u{180e}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}')
        || matches!(c, '\u{feff}' | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e007f}')
}

/// `1234567` as `1,234,567`.
pub(crate) fn thousands(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (n, digit) in digits.chars().enumerate() {
        if n > 0 && (digits.len() - n).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// Bytes in the largest unit that leaves a number above one.
pub(crate) fn bytes(number: u64) -> String {
    #[expect(clippy::cast_precision_loss, reason = "one decimal is shown")]
    let float = number as f64;
    match number {
        0..1024 => format!("{number} B"),
        1024..1_048_576 => format!("{:.1} KiB", float / 1024.0),
        _ => format!("{:.1} MiB", float / 1_048_576.0),
    }
}

/// A length of time in the two largest units, or with one decimal below a minute.
pub(crate) fn span(duration: Duration) -> String {
    let seconds = duration.as_secs();
    match seconds {
        0 if duration < Duration::from_millis(1) => micros(duration.as_secs_f64() * 1e6),
        0 => format!("{} ms", duration.as_millis()),
        1..60 => format!("{:.1} s", duration.as_secs_f64()),
        60..3600 => format!("{} m {:02} s", seconds / 60, seconds % 60),
        3600..86_400 => format!("{} h {:02} m", seconds / 3600, seconds / 60 % 60),
        _ => format!("{} d {:02} h", seconds / 86_400, seconds / 3600 % 24),
    }
}

/// Microseconds, in a unit that leaves few digits.
pub(crate) fn micros(us: f64) -> String {
    match us {
        us if us < 10.0 => format!("{us:.1} µs"),
        us if us < 1000.0 => format!("{us:.0} µs"),
        us if us < 100_000.0 => format!("{:.1} ms", us / 1e3),
        us if us < 1_000_000.0 => format!("{:.0} ms", us / 1e3),
        us => format!("{:.2} s", us / 1e6),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_terminal_could_act_on_is_escaped() {
        assert_eq!(escape("a\u{1b}[2J\r\n\u{9b}\u{202e}é\0"), "a\\u{1b}[2J\\u{d}\\u{a}\\u{9b}\\u{202e}é\\u{0}");
        let json = serde_json::to_string("\u{9b}31m\u{202e}\u{e0041}\u{1b}ü").unwrap();
        let safe = json_for_terminals(&json);
        assert_eq!(safe, "\"\\u009b31m\\u202e\\udb40\\udc41\\u001bü\"");
        assert_eq!(serde_json::from_str::<String>(&safe).unwrap(), "\u{9b}31m\u{202e}\u{e0041}\u{1b}ü");
    }

    #[test]
    fn numbers_and_times_are_readable() {
        assert_eq!(
            [thousands(0), thousands(999), thousands(1000), thousands(1_234_567)],
            ["0", "999", "1,000", "1,234,567"]
        );
        assert_eq!([bytes(1023), bytes(2048), bytes(5 << 20)], ["1023 B", "2.0 KiB", "5.0 MiB"]);
        assert_eq!(span(Duration::from_secs(1199)), "19 m 59 s");
        assert_eq!(span(Duration::from_millis(250)), "250 ms");
        assert_eq!(span(Duration::from_micros(250)), "250 µs");
        assert_eq!([micros(4.26), micros(1500.0)], ["4.3 µs", "1.5 ms"]);
    }

    #[test]
    fn columns_are_as_wide_as_their_widest_field() {
        let out = Output { json: false, colour: false };
        let mut table = Table::new(&[("name", Align::Left), ("n", Align::Right)]);
        table.row(vec![Cell::new("a"), Cell::new("100")]);
        assert_eq!(table.line(&table.rows[0], &out), "  a      100");
        let out = Output { json: false, colour: true };
        assert_eq!(table.line(&[Cell::styled("ab", Style::Good), Cell::new("1")], &out), "  \u{1b}[32mab\u{1b}[0m       1");
    }
}

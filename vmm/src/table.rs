//! Tables and times as text for people, for the commands that look at running machines.
//!
//! A cell has a tone, which says what it means; each output turns tones into its own colours. Here that is ANSI, which is left to the
//! stream to take out where it does not belong.

use std::fmt::Write as _;

use anstyle::{AnsiColor, Style};

/// What a text means.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Tone {
    /// Nothing special.
    #[default]
    Plain,
    /// A head or a name.
    Strong,
    /// Beside the point.
    Dim,
    /// Power saved.
    Asleep,
    /// As it should be.
    Good,
    /// On its way, or worth a look.
    Notice,
    /// Wrong.
    Bad,
}

impl Tone {
    fn style(self) -> Style {
        let colour = |colour: AnsiColor| Style::new().fg_color(Some(colour.into()));
        match self {
            Self::Plain => Style::new(),
            Self::Strong => Style::new().bold(),
            Self::Dim => Style::new().dimmed(),
            Self::Asleep => colour(AnsiColor::Cyan),
            Self::Good => colour(AnsiColor::Green),
            Self::Notice => colour(AnsiColor::Yellow),
            Self::Bad => colour(AnsiColor::Red).bold(),
        }
    }
}

/// A text with its meaning.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Cell {
    /// The text: one line, no control characters.
    pub text: String,
    /// The meaning.
    pub tone: Tone,
}

impl Cell {
    /// A text with its meaning. Control characters, which a name in somebody's configuration may hold, are replaced.
    pub fn new(text: impl AsRef<str>, tone: Tone) -> Self {
        let text = text.as_ref().chars().map(|c| if c.is_control() { '?' } else { c }).collect();
        Self { text, tone }
    }

    /// A text without one.
    pub fn plain(text: impl AsRef<str>) -> Self {
        Self::new(text, Tone::Plain)
    }

    /// A number, or a dash for none.
    pub fn count(count: u64) -> Self {
        if count == 0 { Self::new("-", Tone::Dim) } else { Self::plain(count.to_string()) }
    }

    /// A text, or a dash where there is none.
    pub fn or_dash(text: Option<&str>) -> Self {
        text.map_or_else(|| Self::new("-", Tone::Dim), Self::plain)
    }

    /// Columns that it takes.
    pub fn width(&self) -> usize {
        self.text.chars().count()
    }

    /// The text in its colour.
    pub fn ansi(&self) -> String {
        let style = self.tone.style();
        format!("{style}{}{style:#}", self.text)
    }
}

/// Widths of the columns of these rows; the last cell of a row may be as long as it likes.
pub fn widths(rows: &[Vec<Cell>]) -> Vec<usize> {
    let columns = rows.iter().map(Vec::len).max().unwrap_or_default();
    let width = |column: usize| rows.iter().filter_map(|row| row.get(column)).map(Cell::width).max();
    (0..columns).map(|column| width(column).unwrap_or_default()).collect()
}

/// Rows below a head, each line after `indent` spaces.
pub fn table(head: &[&str], rows: Vec<Vec<Cell>>, indent: usize) -> String {
    let head = head.iter().map(|name| Cell::new(name, Tone::Strong)).collect();
    let rows: Vec<Vec<Cell>> = std::iter::once(head).chain(rows).collect();
    let widths = widths(&rows);
    let mut text = String::new();
    for row in &rows {
        let _ = write!(text, "{:indent$}", "");
        for (number, (cell, width)) in row.iter().zip(&widths).enumerate() {
            text.push_str(&cell.ansi());
            if number + 1 < row.len() {
                let _ = write!(text, "{:1$}", "", width - cell.width() + 2);
            }
        }
        text.push('\n');
    }
    text
}

/// A time as people say it: two units at most.
pub fn duration(ms: u64) -> String {
    let seconds = ms / 1000;
    let two = |high: u64, high_unit, low: u64, low_unit| match low {
        0 => format!("{high} {high_unit}"),
        low => format!("{high} {high_unit} {low} {low_unit}"),
    };
    match seconds {
        0 => format!("{ms} ms"),
        1..10 => format!("{seconds}.{} s", ms % 1000 / 100),
        10..60 => format!("{seconds} s"),
        60..3600 => two(seconds / 60, "min", seconds % 60, "s"),
        3600..86400 => two(seconds / 3600, "h", seconds % 3600 / 60, "min"),
        _ => two(seconds / 86400, "d", seconds % 86400 / 3600, "h"),
    }
}

/// A latency: milliseconds with one decimal below 10, seconds from one on.
pub fn latency(time: std::time::Duration) -> String {
    let us = time.as_micros();
    match us {
        0..1000 => format!("{us} us"),
        1000..10_000 => format!("{}.{} ms", us / 1000, us % 1000 / 100),
        10_000..1_000_000 => format!("{} ms", us / 1000),
        _ => format!("{}.{} s", us / 1_000_000, us % 1_000_000 / 100_000),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn times_have_two_units_at_most() {
        let said = [0, 999, 1500, 59_999, 60_000, 61_000, 3_600_000, 7_380_000, 90_000_000].map(duration);
        let expected =
            ["0 ms", "999 ms", "1.5 s", "59 s", "1 min", "1 min 1 s", "1 h", "2 h 3 min", "1 d 1 h"];
        assert_eq!(said, expected);
        let said = [7, 1234, 56_789, 2_345_678].map(|us| latency(Duration::from_micros(us)));
        assert_eq!(said, ["7 us", "1.2 ms", "56 ms", "2.3 s"]);
    }

    #[test]
    fn columns_are_as_wide_as_their_widest_cell_and_lines_have_no_blanks_at_their_end() {
        let rows = vec![
            vec![Cell::plain("gpu0"), Cell::plain("on")],
            vec![Cell::plain("a-long-name"), Cell::count(0)],
        ];
        let text = anstream::adapter::strip_str(&table(&["ID", "STATE"], rows, 2)).to_string();
        assert_eq!(text, "  ID           STATE\n  gpu0         on\n  a-long-name  -\n");
    }

    #[test]
    fn a_name_cannot_smuggle_control_characters_into_a_terminal() {
        assert_eq!(Cell::plain("a\x1b[2Jb\n").text, "a?[2Jb?");
    }
}

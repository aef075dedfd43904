//! The display: a title, the devices of each VM, and a line on keys.

use ratatui::Frame;
use ratatui::layout::{Constraint, Layout};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line, Span};
use ratatui::widgets::Paragraph;

use super::board::{Board, Depth};
use super::columns::{Medium, Sheet};
use super::once::heading;
use super::sockets::Source;
use crate::table::{Cell, Tone};

/// Where the user has scrolled to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Scroll {
    /// Lines above the display.
    pub offset: usize,
    /// Lines that the display has for them.
    pub page: usize,
    /// Lines that there are.
    pub lines: usize,
}

impl Scroll {
    /// Moves by so many lines, as far as there are any.
    pub fn by(&mut self, lines: isize) {
        self.offset = self.offset.saturating_add_signed(lines).min(self.last());
    }

    fn last(self) -> usize {
        self.lines.saturating_sub(self.page)
    }
}

/// Draws all of it.
pub fn draw(frame: &mut Frame<'_>, board: &Board, source: &Source, scroll: &mut Scroll) {
    let parts = Layout::vertical([Constraint::Length(1), Constraint::Min(0), Constraint::Length(1)]);
    let [title, middle, keys] = parts.areas(frame.area());
    let body = body(board, source, usize::from(middle.width));
    *scroll = Scroll { page: middle.height.into(), lines: body.len(), ..*scroll };
    scroll.by(0);
    frame.render_widget(Line::from(spans(&summary(board))), title);
    let visible: Vec<Line<'_>> = body.into_iter().skip(scroll.offset).take(scroll.page).collect();
    frame.render_widget(Paragraph::new(visible), middle);
    frame.render_widget(Line::from(spans(&footer(*scroll))), keys);
}

fn summary(board: &Board) -> Vec<Cell> {
    let devices: Vec<Depth> = board.devices().map(|(.., device)| Depth::of(device)).collect();
    let of = |wanted: &[Depth]| devices.iter().filter(|depth| wanted.contains(depth)).count();
    let mut cells = vec![
        Cell::new("dormouse top", Tone::Strong),
        Cell::plain(format!("  {}, {}", number(board.vms().len(), "VM"), number(devices.len(), "device"))),
    ];
    let asleep = of(&[Depth::Cold, Depth::Low]);
    if asleep > 0 {
        cells.push(Cell::new(format!(", {asleep} in low power"), Tone::Asleep));
    }
    let lost = of(&[Depth::Lost]);
    if lost > 0 {
        cells.push(Cell::new(format!(", {lost} lost"), Tone::Bad));
    }
    if let Some(watts) = board.platform {
        cells.push(Cell::plain(format!("  platform {watts:.1} W")));
    }
    cells
}

fn number(count: usize, thing: &str) -> String {
    if count == 1 { format!("1 {thing}") } else { format!("{count} {thing}s") }
}

fn footer(scroll: Scroll) -> Vec<Cell> {
    let mut cells = vec![Cell::new("q", Tone::Strong), Cell::new(" quit", Tone::Dim)];
    if scroll.lines > scroll.page {
        let text = format!(" scroll, {} of {}", scroll.offset + scroll.page, scroll.lines);
        cells.extend([Cell::plain("  "), Cell::new("↑↓", Tone::Strong), Cell::new(text, Tone::Dim)]);
    }
    cells
}

fn body(board: &Board, source: &Source, width: usize) -> Vec<Line<'static>> {
    if board.vms().is_empty() {
        let text = match source {
            Source::Directory(directory) => format!("No virtual machine runs ({}).", directory.display()),
            Source::Named(_) => "Asking...".to_owned(),
        };
        return vec![Line::default(), Line::from(text)];
    }
    let sheet = Sheet::new(board, Medium::Screen(width));
    let mut lines = Vec::new();
    for (vm, rows) in board.vms().iter().zip(&sheet.rows) {
        lines.push(Line::default());
        lines.push(Line::from(spans(&heading(vm))));
        if !rows.is_empty() {
            lines.push(Line::from(spans(&sheet.line(&sheet.head()))).style(Modifier::DIM));
        }
        lines.extend(rows.iter().map(|row| Line::from(spans(&sheet.line(row)))));
    }
    lines
}

fn spans(cells: &[Cell]) -> Vec<Span<'static>> {
    cells.iter().map(|cell| Span::styled(cell.text.clone(), style(cell.tone))).collect()
}

fn style(tone: Tone) -> Style {
    match tone {
        Tone::Plain => Style::new(),
        Tone::Strong => Style::new().add_modifier(Modifier::BOLD),
        Tone::Dim => Style::new().add_modifier(Modifier::DIM),
        Tone::Asleep => Style::new().fg(Color::Cyan),
        Tone::Good => Style::new().fg(Color::Green),
        Tone::Notice => Style::new().fg(Color::Yellow),
        Tone::Bad => Style::new().fg(Color::Red).add_modifier(Modifier::BOLD),
    }
}

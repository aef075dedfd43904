//! What is shown of a device, column by column, and which columns are shown where there is no room for all.

use super::board::{Answer, Board, Depth, Vm};
use crate::client::report::DevicePower;
use crate::table::{Cell, Tone, duration, latency};

/// Width of the bar beside the part of low power.
const BAR: usize = 10;
/// Eighths of a cell of that bar.
const EIGHTHS: [&str; 8] = ["", "▏", "▎", "▍", "▌", "▋", "▊", "▉"];
/// What the history is cut down to before a column is left out.
const SHORT_HISTORY: usize = 10;
/// Blanks between columns.
const GAP: usize = 2;

/// One column: the higher its rank, the earlier it is left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Column {
    /// Its head.
    pub name: &'static str,
    rank: u8,
    kind: Kind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Id,
    Host,
    State,
    Since,
    Power,
    Residency,
    Watts,
    Wake,
    Latency,
    History,
    Policy,
    Trouble,
}

/// All columns, in their order.
const COLUMNS: [Column; 12] = [
    Column { name: "DEVICE", rank: 0, kind: Kind::Id },
    Column { name: "HOST", rank: 5, kind: Kind::Host },
    Column { name: "STATE", rank: 0, kind: Kind::State },
    Column { name: "SINCE", rank: 6, kind: Kind::Since },
    Column { name: "POWER", rank: 1, kind: Kind::Power },
    Column { name: "LOW POWER", rank: 3, kind: Kind::Residency },
    Column { name: "WATTS", rank: 4, kind: Kind::Watts },
    Column { name: "LAST WAKE", rank: 8, kind: Kind::Wake },
    Column { name: "DOWN / UP", rank: 9, kind: Kind::Latency },
    Column { name: "HISTORY", rank: 7, kind: Kind::History },
    Column { name: "POLICY", rank: 10, kind: Kind::Policy },
    Column { name: "TROUBLE", rank: 2, kind: Kind::Trouble },
];

/// What is in a column of one row: texts that follow each other without a blank.
pub type Content = Vec<Cell>;

/// How a table is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Medium {
    /// Text that stays: what one look can say.
    Once,
    /// A screen this wide, with bars and the history.
    Screen(usize),
}

/// Heads and rows, all of the same columns.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sheet {
    /// The columns that are shown.
    pub columns: Vec<Column>,
    /// Their widths.
    pub widths: Vec<usize>,
    /// Rows of each VM, in the order of the board; none where there was no answer.
    pub rows: Vec<Vec<Vec<Content>>>,
}

impl Sheet {
    /// What is shown of all devices.
    pub fn new(board: &Board, medium: Medium) -> Self {
        let mut columns: Vec<Column> = COLUMNS.to_vec();
        columns.retain(|column| match column.kind {
            Kind::History => medium != Medium::Once,
            Kind::Watts => board.devices().any(|(_, answer, _)| !answer.draw.is_empty()),
            Kind::Trouble => board.devices().any(|(.., device)| has_trouble(device)),
            _ => true,
        });
        let rows = |columns: &[Column]| -> Vec<Vec<Vec<Content>>> {
            let rows_of = |vm: &Vm| match &vm.answer {
                Ok(answer) => {
                    let devices = answer.power.devices.iter();
                    devices
                        .map(|device| {
                            let content =
                                |column: &Column| content(column.kind, board, vm, answer, device, medium);
                            columns.iter().map(content).collect()
                        })
                        .collect()
                }
                Err(_) => Vec::new(),
            };
            board.vms().iter().map(rows_of).collect()
        };
        let widths = |columns: &[Column], rows: &[Vec<Vec<Content>>]| -> Vec<usize> {
            let contents = |number: usize| rows.iter().flatten().map(move |row| width(&row[number]));
            let of = |(number, column): (usize, &Column)| {
                contents(number).max().unwrap_or(0).max(column.name.len())
            };
            columns.iter().enumerate().map(of).collect()
        };
        let all = rows(&columns);
        let mut sheet = Self { widths: widths(&columns, &all), columns, rows: all };
        if let Medium::Screen(room) = medium {
            sheet.fit(room);
        }
        sheet
    }

    /// Leaves columns out until the rest fits. The history gets what is left over.
    fn fit(&mut self, room: usize) {
        let wish = self.limit_history(SHORT_HISTORY);
        self.leave_out(room);
        let used = self.widths.iter().sum::<usize>() + GAP * self.widths.len().saturating_sub(1);
        if let Some(number) = self.columns.iter().position(|column| column.kind == Kind::History) {
            self.widths[number] = wish.min(self.widths[number] + room.saturating_sub(used));
            let width = self.widths[number];
            for row in self.rows.iter_mut().flatten() {
                let surplus = row[number].len().saturating_sub(width);
                row[number].drain(..surplus);
            }
        }
    }

    /// Lets the history be so wide at most; returns what it would be.
    fn limit_history(&mut self, limit: usize) -> usize {
        let Some(number) = self.columns.iter().position(|column| column.kind == Kind::History) else {
            return 0;
        };
        let wish = self.widths[number];
        self.widths[number] = wish.min(limit);
        wish
    }

    fn leave_out(&mut self, room: usize) {
        while self.widths.iter().sum::<usize>() + GAP * self.widths.len().saturating_sub(1) > room {
            let ranked = self.columns.iter().enumerate().filter(|(_, column)| column.rank > 0);
            let Some((number, _)) = ranked.max_by_key(|(_, column)| column.rank) else { return };
            self.columns.remove(number);
            self.widths.remove(number);
            for row in self.rows.iter_mut().flatten() {
                row.remove(number);
            }
        }
    }

    /// The head as a row.
    pub fn head(&self) -> Vec<Content> {
        self.columns.iter().map(|column| vec![Cell::new(column.name, Tone::Strong)]).collect()
    }

    /// A row as texts with blanks between its columns, and none at its end.
    pub fn line(&self, row: &[Content]) -> Vec<Cell> {
        let mut cells = Vec::new();
        for (number, content) in row.iter().enumerate() {
            cells.extend(content.iter().cloned());
            if number + 1 < row.len() {
                let blanks = self.widths[number].saturating_sub(width(content)) + GAP;
                cells.push(Cell::plain(" ".repeat(blanks)));
            }
        }
        cells
    }
}

fn width(content: &[Cell]) -> usize {
    content.iter().map(Cell::width).sum()
}

fn has_trouble(device: &DevicePower) -> bool {
    device.latched_by.is_some() || !device.troubles().is_empty()
}

fn content(
    kind: Kind,
    board: &Board,
    vm: &Vm,
    answer: &Answer,
    device: &DevicePower,
    medium: Medium,
) -> Content {
    let one = |cell: Cell| vec![cell];
    match kind {
        Kind::Id => one(Cell::plain(&device.id)),
        Kind::Host => one(Cell::plain(&device.bdf)),
        Kind::State => one(device.state_cell()),
        Kind::Since => one(Cell::plain(duration(device.state_ms))),
        Kind::Power => one(device.host_cell()),
        Kind::Residency => residency(device, medium),
        Kind::Watts => one(match answer.draw.get(&device.bdf) {
            None => Cell::or_dash(None),
            Some(draw) if draw.shared => Cell::plain(format!("{:.1} (port)", draw.watts)),
            Some(draw) => Cell::plain(format!("{:.1}", draw.watts)),
        }),
        Kind::Wake => one(match (&device.last_wake_cause, device.last_wake_ms) {
            (Some(cause), Some(ms)) => Cell::plain(format!("{cause}, {} ago", duration(ms))),
            _ => Cell::or_dash(None),
        }),
        Kind::Latency => {
            let middle = |times: &vfio_pm::Histogram| times.percentile(50).map(latency);
            one(match (middle(&device.entry_latency), middle(&device.exit_latency)) {
                (None, None) => Cell::or_dash(None),
                (down, up) => {
                    let text = |time: Option<String>| time.unwrap_or_else(|| "-".to_owned());
                    Cell::plain(format!("{} / {}", text(down), text(up)))
                }
            })
        }
        Kind::History => history(board, vm, device),
        Kind::Policy => one(policy(device)),
        Kind::Trouble => one(device.trouble_cell()),
    }
}

fn residency(device: &DevicePower, medium: Medium) -> Content {
    let Some(percent) = device.residency() else { return vec![Cell::or_dash(None)] };
    let number = format!("{percent:.1} %");
    if medium == Medium::Once {
        return vec![Cell::plain(number)];
    }
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a percentage")]
    let eighths = ((percent / 100.0 * (BAR * 8) as f64).round() as usize).min(BAR * 8);
    let bar = format!("{}{}", "█".repeat(eighths / 8), EIGHTHS[eighths % 8]);
    let rest = BAR - bar.chars().count();
    vec![
        Cell::new(bar, Tone::Asleep),
        Cell::new("·".repeat(rest), Tone::Dim),
        Cell::plain(format!(" {number:>7}")),
    ]
}

/// The deeper, the lower.
fn history(board: &Board, vm: &Vm, device: &DevicePower) -> Content {
    let mark = |depth: Depth| match depth {
        Depth::Unknown => Cell::new(" ", Tone::Plain),
        Depth::Cold => Cell::new("▁", Tone::Asleep),
        Depth::Low => Cell::new("▂", Tone::Asleep),
        Depth::Hot => Cell::new("▄", Tone::Notice),
        Depth::Between => Cell::new("▆", Tone::Notice),
        Depth::On => Cell::new("█", Tone::Good),
        Depth::Lost => Cell::new("x", Tone::Bad),
    };
    board.history(vm, &device.id).map(mark).collect()
}

/// What is not as usual is worth a look.
fn policy(device: &DevicePower) -> Cell {
    if !device.offered && device.policy("power").as_deref() == Some("auto") {
        return Cell::new("not offered to the guest", Tone::Notice);
    }
    let text = ["power", "wake", "hold_off"].iter().filter_map(|key| {
        let value = device.policy(key)?;
        Some(if *key == "hold_off" { format!("{value} ms") } else { value })
    });
    let text = text.collect::<Vec<_>>().join(" ");
    Cell::or_dash((!text.is_empty()).then_some(&text))
}

//! The live display: takes the terminal, draws what is new, minds the keys, and gives the terminal back however it ends.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, TryRecvError};
use std::time::Duration;

use ratatui::DefaultTerminal;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEvent, KeyEventKind, KeyModifiers};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

use super::TopError;
use super::board::Board;
use super::collect::{self, News};
use super::screen::{Scroll, draw};
use super::sensors::Meter;
use super::sockets::Source;

/// Longest wait for a key, after which news are looked for.
const TICK: Duration = Duration::from_millis(200);

/// Shows `source` until the user leaves.
pub fn run(source: Source, interval: Duration) -> Result<(), TopError> {
    // What is wrong from the start is said on a terminal that is as it was.
    source.sockets()?;
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [SIGTERM, SIGHUP, SIGINT] {
        signal_hook::flag::register(signal, Arc::clone(&stop)).map_err(TopError::Terminal)?;
    }
    let news = collect::watch(source.clone(), interval, Meter::default());
    // This also has a panic restore the terminal before it says anything.
    let result = ratatui::try_init()
        .map_err(TopError::Terminal)
        .and_then(|mut terminal| show(&mut terminal, &source, &news, &stop));
    let restored = ratatui::try_restore().map_err(TopError::Terminal);
    result.and(restored)
}

fn show(
    terminal: &mut DefaultTerminal,
    source: &Source,
    news: &Receiver<News>,
    stop: &AtomicBool,
) -> Result<(), TopError> {
    let (mut board, mut scroll) = (Board::default(), Scroll::default());
    let mut changed = true;
    while !stop.load(Ordering::Relaxed) {
        changed |= take(news, &mut board)?;
        if changed {
            terminal.draw(|frame| draw(frame, &board, source, &mut scroll)).map_err(TopError::Terminal)?;
        }
        changed = match next_event().map_err(TopError::Terminal)? {
            Some(Event::Key(key)) if key.kind != KeyEventKind::Release => match meaning(key) {
                Some(Command::Leave) => break,
                Some(command) => {
                    obey(command, &mut scroll);
                    true
                }
                None => false,
            },
            Some(Event::Resize(..)) => true,
            _ => false,
        };
    }
    Ok(())
}

/// The next key or change of size, if one comes soon.
fn next_event() -> io::Result<Option<Event>> {
    match event::poll(TICK) {
        Ok(true) => event::read().map(Some),
        Ok(false) => Ok(None),
        Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(None),
        Err(error) => Err(error),
    }
}

/// Takes what is new. Whether there was anything.
fn take(news: &Receiver<News>, board: &mut Board) -> Result<bool, TopError> {
    let mut changed = false;
    loop {
        match news.try_recv() {
            Ok(News::Vm(vm)) => board.update(*vm),
            Ok(News::Gone(socket)) => board.remove(&socket),
            Ok(News::Platform(watts)) => board.platform = Some(watts),
            Ok(News::Failed(error)) => return Err(error),
            Err(TryRecvError::Empty | TryRecvError::Disconnected) => return Ok(changed),
        }
        changed = true;
    }
}

/// What a key stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Command {
    Leave,
    Lines(isize),
    Pages(isize),
    Begin,
    End,
}

fn meaning(key: KeyEvent) -> Option<Command> {
    Some(match key.code {
        KeyCode::Char('c') if key.modifiers.contains(KeyModifiers::CONTROL) => Command::Leave,
        KeyCode::Char('q') | KeyCode::Esc => Command::Leave,
        KeyCode::Up | KeyCode::Char('k') => Command::Lines(-1),
        KeyCode::Down | KeyCode::Char('j') => Command::Lines(1),
        KeyCode::PageUp => Command::Pages(-1),
        KeyCode::PageDown => Command::Pages(1),
        KeyCode::Home => Command::Begin,
        KeyCode::End => Command::End,
        _ => return None,
    })
}

fn obey(command: Command, scroll: &mut Scroll) {
    let page = isize::try_from(scroll.page).unwrap_or(isize::MAX);
    match command {
        Command::Leave => {}
        Command::Lines(lines) => scroll.by(lines),
        Command::Pages(pages) => scroll.by(pages.saturating_mul(page)),
        Command::Begin => scroll.by(isize::MIN),
        Command::End => scroll.by(isize::MAX),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(code: KeyCode) -> Option<Command> {
        meaning(KeyEvent::new(code, KeyModifiers::NONE))
    }

    #[test]
    fn q_escape_and_control_c_leave_and_c_alone_does_not() {
        let control = KeyEvent::new(KeyCode::Char('c'), KeyModifiers::CONTROL);
        let leave = Some(Command::Leave);
        assert_eq!([key(KeyCode::Char('q')), key(KeyCode::Esc), meaning(control)], [leave; 3]);
        assert_eq!(key(KeyCode::Char('c')), None);
    }

    #[test]
    fn keys_scroll_to_the_ends_and_no_further() {
        let mut scroll = Scroll { offset: 0, page: 4, lines: 10 };
        for (code, offset) in [
            (KeyCode::Up, 0),
            (KeyCode::Down, 1),
            (KeyCode::PageDown, 5),
            (KeyCode::PageDown, 6),
            (KeyCode::Up, 5),
            (KeyCode::Home, 0),
            (KeyCode::End, 6),
            (KeyCode::PageUp, 2),
        ] {
            obey(key(code).unwrap(), &mut scroll);
            assert_eq!(scroll.offset, offset, "{code:?}");
        }
        let mut short = Scroll { offset: 0, page: 4, lines: 2 };
        obey(Command::End, &mut short);
        assert_eq!(short.offset, 0);
    }
}

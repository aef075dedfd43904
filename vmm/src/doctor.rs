//! `dormouse doctor`: what keeps a device of this host from losing its power, found out without waking it.
//!
//! [`checks`] is the examination, [`survey`] that of all devices, [`verify`] a real attempt. [`host`] is the only way to what is read,
//! [`finding`] what comes out of it, [`render`] its text. docs/doctor.md is for users.

mod checks;
mod class;
mod finding;
mod host;
mod pm;
mod render;
mod survey;
mod usage;
mod verify;

#[cfg(test)]
mod fixture;
#[cfg(test)]
mod tests;

use std::io::{self, Write};

use devices::vfio::bind::Binder;
use pci::Bdf;
use serde_json::json;

use checks::{ExamineError, Patient, examine};
use finding::{JSON_VERSION, Severity};
use host::Host;
use verify::VerifyError;

/// What the user wants to know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DoctorOptions {
    /// The device; all of them without one.
    pub bdf: Option<Bdf>,
    /// For machines.
    pub json: bool,
    /// With a real attempt.
    pub verify: bool,
}

/// The doctor has failed.
#[derive(Debug, thiserror::Error)]
pub enum DoctorError {
    /// A device cannot be examined.
    #[error(transparent)]
    Examine(#[from] ExamineError),
    /// The attempt was interrupted.
    #[error(transparent)]
    Interrupted(VerifyError),
    /// Signals could not be handled, which the attempt needs to put everything back.
    #[error("signals cannot be handled; the device is not tried")]
    Signals(#[source] io::Error),
    /// Nobody takes what is written.
    #[error("the report cannot be written to standard output")]
    Output(#[source] io::Error),
    /// It has no JSON form.
    #[error("the report has no JSON form")]
    Json(#[from] serde_json::Error),
}

/// Examines this host and prints what was found. Returns the exit status: 0, or 2 for warnings, or 3 for blockers.
///
/// # Errors
/// See [`DoctorError`].
pub fn run(options: DoctorOptions) -> Result<u8, DoctorError> {
    let (text, severity) = consult(&Host::default(), options)?;
    // The stream takes the colour out where it does not belong.
    let written = anstream::stdout().lock().write_all(text.as_bytes());
    match written {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(DoctorError::Output(error)),
        _ => Ok(severity.exit_status()),
    }
}

/// What is to be printed, and how bad it is.
fn consult(host: &Host, options: DoctorOptions) -> Result<(String, Severity), DoctorError> {
    let Some(bdf) = options.bdf else {
        let reports = survey::survey(host)?;
        let text = if options.json {
            json_text(&json!({"version": JSON_VERSION, "devices": reports}))?
        } else {
            render::table(&reports)
        };
        return Ok((text, survey::best(&reports)));
    };
    let mut report = examine(host, bdf)?;
    if options.verify {
        let stop = verify::stop_on_signals().map_err(DoctorError::Signals)?;
        let patient = Patient::read(host, bdf)?;
        match verify::verify(host, &Binder::default(), &patient, &stop) {
            Ok((measurement, findings)) => {
                findings.into_iter().for_each(|finding| report.add(finding));
                report.verification = Some(measurement);
            }
            Err(error @ VerifyError::Interrupted(_)) => return Err(DoctorError::Interrupted(error)),
            Err(error) => report.add(error.finding(bdf)),
        }
    }
    let text = if options.json {
        let mut value = serde_json::to_value(&report)?;
        value["version"] = JSON_VERSION.into();
        json_text(&value)?
    } else {
        render::report(&report)
    };
    Ok((text, report.severity))
}

fn json_text(value: &serde_json::Value) -> Result<String, DoctorError> {
    Ok(format!("{}\n", serde_json::to_string_pretty(value)?))
}

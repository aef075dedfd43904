//! News of devices' power on its way to operators: `device-power` events and debug messages. Small and rate-limited: the
//! domains see to the rate.

use log::{Level, debug, log_enabled};
use vfio_pm::{News, NewsSink, PowerNews};

use crate::events::{Events, Properties};

/// All news of power: to the event monitor, and to the log as one JSON object a line for those who ask for debug messages.
#[derive(Debug)]
pub struct PowerTeller {
    /// Where events go.
    pub events: Events,
    /// Names by host address.
    pub ids: Vec<(String, String)>,
}

/// Longest property of an event: readers have buffers of a fixed size.
const LONGEST_PROPERTY: usize = 300;

impl NewsSink for PowerTeller {
    fn tell(&self, news: &PowerNews) {
        if log_enabled!(Level::Debug)
            && let Ok(text) = serde_json::to_string(news)
        {
            debug!("power news: {text}");
        }
        if !self.events.are_heard() {
            return;
        }
        let id = self.ids.iter().find(|(bdf, _)| *bdf == news.bdf).map(|(_, id)| id.clone());
        let mut properties: Properties = [("bdf", news.bdf.clone())].into();
        properties.extend(id.map(|id| ("id", id)));
        if news.left_out > 0 {
            properties.insert("left_out", news.left_out.to_string());
        }
        let what = match &news.news {
            News::Transition { from, to, after_ms } => {
                properties.extend([
                    ("from", (*from).to_owned()),
                    ("state", (*to).to_owned()),
                    ("after_ms", after_ms.to_string()),
                ]);
                "transition"
            }
            News::Woken { cause } => {
                properties.insert("cause", (*cause).to_owned());
                "woken"
            }
            News::Failed { failure, message } => {
                properties.insert("failure", (*failure).to_owned());
                properties.insert("message", message.chars().take(LONGEST_PROPERTY).collect());
                "failed"
            }
            News::Denied { why, wait_ms } => {
                properties.insert("why", (*why).to_owned());
                properties.extend(wait_ms.map(|wait| ("wait_ms", wait.to_string())));
                "denied"
            }
            News::Latched => "latched",
            News::Unlatched => "unlatched",
            News::Recovered => "recovered",
        };
        properties.insert("what", what.to_owned());
        self.events.tell_with("vm", "device-power", properties);
    }
}

//! Which containers changed, as the runtime tells it: CRI's own event stream where the runtime has it, else containerd's event service.
use prost::Message;
use tokio::sync::mpsc;
use tracing::{debug, info};

use super::{Cri, v1};

#[allow(rust_2018_idioms)]
mod containerd {
    tonic::include_proto!("containerd.services.events.v1");
}

/// The namespace in containerd that its CRI plugin keeps everything in.
const CRI_NAMESPACE: &str = "k8s.io";

/// One change of a container or sandbox.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RuntimeEvent {
    Started {
        id: String,
    },
    Exited {
        id: String,
    },
    /// Memory ran out in the container's cgroup.
    OutOfMemory {
        id: String,
    },
    /// Events may have been lost: look at everything.
    Gap,
}

/// Which stream the runtime offers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    Cri,
    Containerd,
    None,
}

/// Feeds `sink` until it's closed; takes a broken stream up again. Returns when the runtime offers no stream at all.
pub async fn follow(cri: Cri, sink: mpsc::UnboundedSender<RuntimeEvent>) -> Source {
    let mut announced = None;
    loop {
        let source = match follow_cri(&cri, &sink, &mut announced).await {
            Ended::Unsupported => match follow_containerd(&cri, &sink, &mut announced).await {
                Ended::Unsupported => return Source::None,
                Ended::Broken => Source::Containerd,
            },
            Ended::Broken => Source::Cri,
        };
        if sink.send(RuntimeEvent::Gap).is_err() {
            return source;
        }
        tokio::time::sleep(std::time::Duration::from_millis(500)).await;
    }
}

enum Ended {
    Unsupported,
    Broken,
}

/// The stream is open: what happened since the last one ended has to be looked at.
fn announce(announced: &mut Option<Source>, source: Source, sink: &mpsc::UnboundedSender<RuntimeEvent>) -> Result<(), Ended> {
    if announced.replace(source) != Some(source) {
        info!(?source, "listening to the runtime's container events");
    }
    sink.send(RuntimeEvent::Gap).map_err(|_| Ended::Broken)
}

async fn follow_cri(cri: &Cri, sink: &mpsc::UnboundedSender<RuntimeEvent>, announced: &mut Option<Source>) -> Ended {
    let mut stream = match cri.runtime().get_container_events(v1::GetEventsRequest {}).await {
        Ok(stream) => stream.into_inner(),
        Err(status) if status.code() == tonic::Code::Unimplemented => return Ended::Unsupported,
        Err(status) => {
            debug!(%status, "no event stream");
            return Ended::Broken;
        }
    };
    if let Err(ended) = announce(announced, Source::Cri, sink) {
        return ended;
    }
    loop {
        let event = match stream.message().await {
            Ok(Some(event)) => event,
            Err(status) if status.code() == tonic::Code::Unimplemented => return Ended::Unsupported,
            Ok(None) | Err(_) => return Ended::Broken,
        };
        let id = event.container_id.clone();
        let event = match event.container_event_type() {
            v1::ContainerEventType::ContainerStartedEvent => RuntimeEvent::Started { id },
            v1::ContainerEventType::ContainerStoppedEvent => RuntimeEvent::Exited { id },
            v1::ContainerEventType::ContainerCreatedEvent | v1::ContainerEventType::ContainerDeletedEvent => continue,
        };
        if sink.send(event).is_err() {
            return Ended::Broken;
        }
    }
}

async fn follow_containerd(cri: &Cri, sink: &mpsc::UnboundedSender<RuntimeEvent>, announced: &mut Option<Source>) -> Ended {
    let mut client = containerd::events_client::EventsClient::new(cri.channel());
    let filters =
        ["/tasks/start", "/tasks/exit", "/tasks/oom"].map(|topic| format!("namespace=={CRI_NAMESPACE},topic==\"{topic}\"")).to_vec();
    let mut stream = match client.subscribe(containerd::SubscribeRequest { filters }).await {
        Ok(stream) => stream.into_inner(),
        Err(status) if status.code() == tonic::Code::Unimplemented => return Ended::Unsupported,
        Err(status) => {
            debug!(%status, "no event stream");
            return Ended::Broken;
        }
    };
    if let Err(ended) = announce(announced, Source::Containerd, sink) {
        return ended;
    }
    loop {
        match stream.message().await {
            Ok(Some(envelope)) => {
                if let Some(event) = decode(&envelope)
                    && sink.send(event).is_err()
                {
                    return Ended::Broken;
                }
            }
            Err(status) if status.code() == tonic::Code::Unimplemented => return Ended::Unsupported,
            Ok(None) | Err(_) => return Ended::Broken,
        }
    }
}

fn decode(envelope: &containerd::Envelope) -> Option<RuntimeEvent> {
    let bytes = envelope.event.as_ref()?.value.as_slice();
    match envelope.topic.as_str() {
        "/tasks/start" => containerd::TaskStart::decode(bytes).ok().map(|event| RuntimeEvent::Started { id: event.container_id }),
        // A program run by exec has an id of its own: only the container's first process ends the container.
        "/tasks/exit" => containerd::TaskExit::decode(bytes)
            .ok()
            .filter(|event| event.id == event.container_id)
            .map(|event| RuntimeEvent::Exited { id: event.container_id }),
        "/tasks/oom" => containerd::TaskOom::decode(bytes).ok().map(|event| RuntimeEvent::OutOfMemory { id: event.container_id }),
        _ => None,
    }
}

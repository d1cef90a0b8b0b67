//! exec, attach and run: the client's streams joined to the runtime's.
use std::sync::Arc;
use std::time::Duration;

use http::{Request, Response, StatusCode};
use hyper::body::Incoming;
use outrigger_streaming::client;
use outrigger_streaming::session::{self, Wanted};
use outrigger_streaming::upgrade::Rejection;
use tracing::debug;

use super::route::{Query, Target};
use super::{Body, Context, body, containers, text};
use crate::cri::{self, v1};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Exec,
    Attach,
}

/// An answer of the upgrade negotiation as ours.
pub fn rejected(rejection: &Rejection) -> Response<Body> {
    rejection.response().map(body)
}

/// The runtime's error with the status that upstream's streaming library gives it.
fn failed(error: &cri::Error) -> Response<Body> {
    let status = match error.code {
        tonic::Code::NotFound => StatusCode::NOT_FOUND,
        tonic::Code::ResourceExhausted => StatusCode::TOO_MANY_REQUESTS,
        _ => StatusCode::INTERNAL_SERVER_ERROR,
    };
    text(status, error.to_string())
}

/// The container's id in the runtime, or the answer that says why there is none.
async fn container_id(context: &Context, target: &Target<'_>) -> Result<String, Box<Response<Body>>> {
    let pod = context.kubelet.pod(target.namespace, target.pod);
    let pod = pod.filter(|pod| target.uid.is_none_or(|uid| pod.metadata.uid.as_deref() == Some(uid)));
    let Some(pod) = pod else { return Err(Box::new(text(StatusCode::NOT_FOUND, "pod does not exist"))) };
    match containers::find(&context.cri, &pod, target.container).await {
        Ok(Some(container)) => Ok(container.id),
        Ok(None) => Err(Box::new(text(StatusCode::INTERNAL_SERVER_ERROR, format!("container not found ({:?})", target.container)))),
        Err(error) => Err(Box::new(failed(&error))),
    }
}

pub async fn stream(context: &Arc<Context>, target: &Target<'_>, kind: Kind, mut request: Request<Incoming>) -> Response<Body> {
    let query = Query::of(request.uri());
    let wanted =
        Wanted { stdin: query.is_set("input"), stdout: query.is_set("output"), stderr: query.is_set("error"), tty: query.is_set("tty") };
    let wanted = match wanted.checked() {
        Ok(wanted) => wanted,
        Err(rejection) => return rejected(&rejection),
    };
    let id = match container_id(context, target).await {
        Ok(id) => id,
        Err(response) => return *response,
    };
    let (dialect, upgrade) = match session::negotiate(&mut request) {
        Ok(agreed) => agreed,
        Err(rejection) => return rejected(&rejection),
    };
    let url = match kind {
        Kind::Exec => exec_url(context, id, query.all("command"), wanted).await,
        Kind::Attach => attach_url(context, id, wanted).await,
    };
    let url = match url {
        Ok(url) => url,
        Err(error) => return failed(&error),
    };
    let pod = format!("{}/{}", target.namespace, target.pod);
    tokio::spawn(async move {
        if let Err(error) = relay(dialect, upgrade.protocol, upgrade.connection, wanted, &url).await {
            debug!(pod, ?kind, %error, "a command's streams broke off");
        }
    });
    upgrade.response.map(|()| body(""))
}

async fn relay(
    dialect: outrigger_streaming::upgrade::Dialect,
    protocol: &'static str,
    connection: hyper::upgrade::OnUpgrade,
    wanted: Wanted,
    url: &str,
) -> std::io::Result<()> {
    let session = session::accept(dialect, protocol, connection, wanted).await?;
    match client::connect(url, wanted).await {
        Ok(remote) => session.relay(remote).await,
        Err(error) => {
            let status = serde_json::json!({
                "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
                "message": error.to_string(), "reason": "InternalError", "code": 500
            });
            session.finish(status.to_string().as_bytes()).await
        }
    }
}

async fn exec_url(context: &Context, container_id: String, cmd: Vec<String>, wanted: Wanted) -> cri::Result<String> {
    let request = v1::ExecRequest { container_id, cmd, tty: wanted.tty, stdin: wanted.stdin, stdout: wanted.stdout, stderr: wanted.stderr };
    let answer = context.cri.runtime().exec(request).await;
    answer.map(|answer| answer.into_inner().url).map_err(|status| error("Exec", &status))
}

async fn attach_url(context: &Context, container_id: String, wanted: Wanted) -> cri::Result<String> {
    let request = v1::AttachRequest { container_id, stdin: wanted.stdin, tty: wanted.tty, stdout: wanted.stdout, stderr: wanted.stderr };
    let answer = context.cri.runtime().attach(request).await;
    answer.map(|answer| answer.into_inner().url).map_err(|status| error("Attach", &status))
}

fn error(call: &'static str, status: &tonic::Status) -> cri::Error {
    cri::Error { call, code: status.code(), message: status.message().to_owned() }
}

/// Runs a command to its end and answers with its output.
pub async fn run(context: &Context, target: &Target<'_>, query: &Query) -> Response<Body> {
    let id = match container_id(context, target).await {
        Ok(id) => id,
        Err(response) => return *response,
    };
    let command: Vec<String> = query.get("cmd").unwrap_or_default().split(' ').map(str::to_owned).collect();
    match context.cri.exec_sync(&id, command, Duration::ZERO).await {
        Ok(output) if output.exit_code == 0 => text(StatusCode::OK, String::from_utf8_lossy(&[output.stdout, output.stderr].concat())),
        Ok(output) => text(StatusCode::INTERNAL_SERVER_ERROR, format!("command terminated with exit code {}", output.exit_code)),
        Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()),
    }
}

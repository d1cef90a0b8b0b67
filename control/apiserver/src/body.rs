//! Bodies of requests and responses: one boxed type in, one out, whichever transport carries them.

use bytes::Bytes;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, Limited};

pub type BoxError = Box<dyn std::error::Error + Send + Sync>;
pub type ReqBody = UnsyncBoxBody<Bytes, BodyError>;
pub type RespBody = UnsyncBoxBody<Bytes, BodyError>;
pub type Request = http::Request<ReqBody>;
pub type Response = http::Response<RespBody>;

/// Whatever broke a body on its way.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
pub struct BodyError(pub BoxError);

/// The largest request body that is read, as upstream's default.
pub const MAX_BODY: usize = 3 * 1024 * 1024;

pub fn boxed<B>(body: B) -> UnsyncBoxBody<Bytes, BodyError>
where
    B: http_body::Body<Data = Bytes> + Send + 'static,
    B::Error: Into<BoxError>,
{
    body.map_err(|error| BodyError(error.into())).boxed_unsync()
}

pub fn full(bytes: impl Into<Bytes>) -> RespBody {
    boxed(Full::new(bytes.into()))
}

pub enum ReadError {
    TooLarge,
    Broken(BoxError),
}

/// The whole body, up to `MAX_BODY` bytes.
pub async fn read(body: ReqBody) -> Result<Bytes, ReadError> {
    match Limited::new(body, MAX_BODY).collect().await {
        Ok(collected) => Ok(collected.to_bytes()),
        Err(error) if error.is::<http_body_util::LengthLimitError>() => Err(ReadError::TooLarge),
        Err(error) => Err(ReadError::Broken(error)),
    }
}

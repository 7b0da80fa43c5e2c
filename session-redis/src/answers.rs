//! What a server answered: each answer is what was expected, or a failure that says so.
//!
//! What an answer means for an opening or for a waiter is not known here.

use redis::Value;
use session_core::leased::Found;

use crate::layout::{Body, record};
use crate::link::Failure;

pub(crate) fn look_at(body: Value, left: &Value) -> Result<(Body, i64), Failure> {
    Ok((parse_body(body)?, int(left)?))
}

/// Reads the answer to a `GET` of a record.
pub(crate) fn parse_body(body: Value) -> Result<Body, Failure> {
    match body {
        Value::Nil => Ok(Body::Absent),
        Value::BulkString(bytes) => match Body::parse(bytes) {
            Body::Foreign => Err(foreign()),
            body => Ok(body),
        },
        Value::ServerError(error) => Err(Failure::refused(&error)),
        _ => Err(Failure::unexpected("a record came as something else than a string")),
    }
}

pub(crate) fn int(answer: &Value) -> Result<i64, Failure> {
    match answer {
        Value::Int(number) => Ok(*number),
        Value::ServerError(error) => Err(Failure::refused(error)),
        _ => Err(Failure::unexpected("a number came as something else")),
    }
}

pub(crate) fn bytes(answer: Value) -> Option<Vec<u8>> {
    match answer {
        Value::BulkString(bytes) => Some(bytes),
        _ => None,
    }
}

pub(crate) fn array(answer: Value) -> Result<Vec<Value>, Failure> {
    match answer {
        Value::Array(parts) => Ok(parts),
        Value::ServerError(error) => Err(Failure::refused(&error)),
        _ => Err(Failure::unexpected("a list came as something else")),
    }
}

pub(crate) fn only(answers: Vec<Value>) -> Result<Value, Failure> {
    answers.into_iter().next().ok_or_else(|| Failure::unexpected("an answer is missing"))
}

pub(crate) fn answers<const N: usize>(answers: Vec<Value>) -> Result<[Value; N], Failure> {
    answers.try_into().map_err(|_| Failure::unexpected("an answer is missing"))
}

/// Gives each request of a flight its own outcome.
pub(crate) fn spread(answers: Result<Vec<Value>, Failure>, count: usize) -> Vec<Result<Value, Failure>> {
    match answers {
        Ok(answers) if answers.len() == count => answers.into_iter().map(Ok).collect(),
        Ok(_) => (0..count).map(|_| Err(Failure::unexpected("an answer is missing"))).collect(),
        Err(failure) => (0..count).map(|_| Err(failure.again())).collect(),
    }
}

/// Makes of a record what an opening goes by; `left` is what `PTTL` said.
pub(crate) fn found(body: Body, left: i64) -> Result<Found, Failure> {
    match body {
        Body::Absent => Ok(Found::Absent),
        Body::Buried { mark } => Ok(Found::Buried { mark }),
        Body::Live { last, data } => Ok(Found::Live { last, record: record(data, left) }),
        Body::Foreign => Err(foreign()),
    }
}

pub(crate) fn foreign() -> Failure {
    Failure::corrupt("the record is nothing that any version of this library writes; it was left alone")
}

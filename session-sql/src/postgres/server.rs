//! How a statement is asked: its parameters, its connection, its time, and how its rows are read.
//!
//! Nothing here knows what a statement says.

use std::time::Duration;

use session_core::{ErrorKind, LeaseToken};
use sqlx::postgres::{PgArguments, PgRow};
use sqlx::{Arguments, Decode, Encode, Row, SqlStr, Type};

use super::errors::{self, Told};
use crate::connections::Connections;
use crate::database::Failure;

pub(super) struct Server {
    pub(super) connections: Connections<sqlx::Postgres>,
    pub(super) timeout: Duration,
}

impl Server {
    /// Does one statement on a connection of its own and returns its rows, the whole answer read: it has been committed.
    ///
    /// # Cancel safety
    /// Whether a dropped statement was done is unknown; its connection is closed.
    pub(super) async fn ask(&self, sql: &SqlStr, parameters: Parameters) -> Result<Vec<PgRow>, Failure> {
        let mut line = self.connections.take().await.map_err(errors::unconnected)?;
        let (connection, clock) = line.timed();
        let query = sqlx::query_with(sql.clone(), parameters.0).fetch_all(connection);
        let Ok(answer) = clock.limit(self.timeout, query).await else {
            // The connection is closed: what it says next is the answer to this.
            let fact = format!("no answer from the database within {} ms", self.timeout.as_millis());
            return Err(Failure { sent: true, ..Failure::new(ErrorKind::Unavailable, fact) });
        };
        match answer {
            Ok(rows) => {
                line.give_back();
                Ok(rows)
            }
            Err(error) => {
                let Told { failure, usable } = errors::asked(error);
                if usable {
                    line.give_back();
                } else {
                    self.connections.distrust();
                }
                Err(failure)
            }
        }
    }
}

/// The parameters of a statement, in order.
#[derive(Default)]
pub(super) struct Parameters(PgArguments);

impl Parameters {
    pub(super) fn new() -> Self {
        Self::default()
    }

    pub(super) fn add<'q, T>(mut self, value: T) -> Result<Self, Failure>
    where
        T: Encode<'q, sqlx::Postgres> + Type<sqlx::Postgres>,
    {
        self.0.add(value).map_err(|_| Failure::unexpected("a parameter cannot be sent"))?;
        Ok(self)
    }
}

pub(super) fn bytes(token: LeaseToken) -> Vec<u8> {
    token.to_bytes().to_vec()
}

/// Makes a column of an array.
pub(super) fn list<'a, T, U>(of: &'a [T], each: impl Fn(&'a T) -> U) -> Vec<U> {
    of.iter().map(each).collect()
}

pub(super) fn field<'r, T>(row: &'r PgRow, index: usize) -> Result<T, Failure>
where
    T: Decode<'r, sqlx::Postgres> + Type<sqlx::Postgres>,
{
    row.try_get(index).map_err(|_| errors::strange())
}

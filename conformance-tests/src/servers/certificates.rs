//! Certificates for servers on the loopback, made anew for each: an authority of their own, and one server that it vouches for.
//!
//! Nothing here knows which server shows them.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use rcgen::{BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose};

/// The certificate of the authority, which a client has to trust.
pub(super) const CA: &str = "ca.pem";

/// The certificate of the server, for `localhost` and `127.0.0.1`.
pub(super) const SERVER: &str = "server.pem";

/// The key of the server.
pub(super) const SERVER_KEY: &str = "server.key";

/// Makes all three in `directory`.
pub(super) fn make(directory: &Path) -> io::Result<()> {
    let (authority, server, key) = sign().map_err(io::Error::other)?;
    fs::write(directory.join(CA), authority)?;
    fs::write(directory.join(SERVER), server)?;
    // Some servers refuse a key that others may read.
    let mut file = File::options().create_new(true).write(true).mode(0o600).open(directory.join(SERVER_KEY))?;
    file.write_all(key.as_bytes())
}

fn sign() -> Result<(String, String, String), rcgen::Error> {
    let mut authority = named("an authority of tests", &[])?;
    authority.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    authority.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let key = KeyPair::generate()?;
    let certificate = authority.self_signed(&key)?;
    let issuer = Issuer::new(authority, key);

    let mut server = named("a server of tests", &["localhost", "127.0.0.1"])?;
    server.use_authority_key_identifier_extension = true;
    server.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    // Both: the servers of a cluster are clients of each other.
    server.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    let server_key = KeyPair::generate()?;
    let signed = server.signed_by(&server_key, &issuer)?;
    Ok((certificate.pem(), signed.pem(), server_key.serialize_pem()))
}

fn named(name: &str, addresses: &[&str]) -> Result<CertificateParams, rcgen::Error> {
    let mut parameters = CertificateParams::new(addresses.iter().map(ToString::to_string).collect::<Vec<_>>())?;
    parameters.distinguished_name.push(DnType::CommonName, name);
    Ok(parameters)
}

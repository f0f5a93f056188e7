//! Strangers at the port where a host waits for other hosts' VMs.
use crate::enter::enter;
use crate::netns::Netns;
use anyhow::{Context, Result, bail};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// Bound for the answer of a listener.
const PATIENCE: Duration = Duration::from_secs(15);
/// Connections that say nothing.
const SILENT: usize = 4;

/// Who a client says it is.
#[derive(Clone, Copy, Debug)]
pub enum Identity<'a> {
    /// Nobody.
    None,
    /// A host of another authority: the file with its certificate and key.
    Foreign(&'a Path),
}

/// Opens connections from a namespace that say nothing. They are held until dropped.
///
/// # Errors
/// When the listener does not accept.
pub fn keep_silent(from: &Netns, to: SocketAddr) -> Result<Vec<TcpStream>> {
    let connect = || Ok(TcpStream::connect_timeout(&to, PATIENCE)?);
    enter(from.name(), || (0..SILENT).map(|_| connect()).collect())
}

/// Tries to get in by TLS, trusting the authority in `trust`; returns why it was refused.
///
/// # Errors
/// When it was let in.
pub fn try_tls(from: &Netns, to: SocketAddr, host: &str, trust: &Path, identity: Identity<'_>) -> Result<String> {
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_file_iter(trust)? {
        roots.add(certificate?)?;
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_root_certificates(roots);
    let config = match identity {
        Identity::None => builder.with_no_client_auth(),
        Identity::Foreign(file) => {
            let chain: Result<Vec<_>, _> = CertificateDer::pem_file_iter(file)?.collect();
            builder.with_client_auth_cert(chain?, PrivateKeyDer::from_pem_file(file)?)?
        }
    };
    let mut socket = enter(from.name(), || Ok(TcpStream::connect_timeout(&to, PATIENCE)?))?;
    socket.set_read_timeout(Some(PATIENCE))?;
    let name = ServerName::try_from(host.to_string()).context("host name")?;
    let mut tls = ClientConnection::new(Arc::new(config), name)?;
    let mut stream = rustls::Stream::new(&mut tls, &mut socket);
    let mut answer = [0; 1];
    match stream.write_all(b"hello").and_then(|()| stream.read_exact(&mut answer)) {
        Ok(()) => bail!("{identity:?} was answered"),
        Err(e) => Ok(e.to_string()),
    }
}

//! One vhost-user port: protocol session, guest memory, virtqueues, dirty-page log.

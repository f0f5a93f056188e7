//! ferryd and ferry: configuration, local API, metrics.

"""How the controller proves itself to a real Consul: token and certificates, from the files that `consul:` names."""

import ssl

from controller.config import ConsulConfig
from outrider.errors import ConfigError


def token(config: ConsulConfig) -> str:
    try:
        return config.token_file.read_text().strip() if config.token_file else ""
    except OSError as error:
        raise ConfigError(f"consul.token_file: {config.token_file} cannot be read: {error.strerror}") from error


def client_tls(config: ConsulConfig) -> ssl.SSLContext | None:
    if not config.url.startswith("https://"):
        return None
    try:
        context = ssl.create_default_context(cafile=config.ca_file)
        if config.cert_file is not None:
            context.load_cert_chain(config.cert_file, config.key_file)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"consul: ca_file, cert_file or key_file cannot be used: {error}") from error
    return context

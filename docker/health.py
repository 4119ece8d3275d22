"""The images' health check: whether the server of this container says on its ops port that it is ready."""

import os
import ssl
import urllib.request

environment = os.environ  # noqa: TID251 - not of the server, but about it
# Its certificate is for the name by which others know it.
tls = ssl._create_unverified_context() if environment.get("UNETPP_HTTP__TLS_CERT") else None  # noqa: S323
url = f"http{'s' if tls else ''}://127.0.0.1:{environment['UNETPP_HTTP__OPS_PORT']}/health/ready"
# Never through a proxy, which Docker's clients may put into the environment of every container.
handlers = [urllib.request.ProxyHandler({}), *([urllib.request.HTTPSHandler(context=tls)] if tls else [])]
urllib.request.build_opener(*handlers).open(url, timeout=4).close()

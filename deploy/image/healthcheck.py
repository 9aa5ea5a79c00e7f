"""HEALTHCHECK of the images: ends with 0 while the server on this machine answers /health with 200.

Set ``FOVEATE_PORT`` and ``FOVEATE_TLS_CERT`` as variables, if they differ from the image's: a health check sees neither
the flags nor the configuration file of the server.
"""

import os
import ssl
import sys
import urllib.request

tls = ssl.create_default_context()
tls.check_hostname = False  # the server is on this machine, and its certificate names another
tls.verify_mode = ssl.CERT_NONE
scheme = "https" if os.environ.get("FOVEATE_TLS_CERT") else "http"
url = f"{scheme}://127.0.0.1:{os.environ.get('FOVEATE_PORT') or 8000}/health"
direct = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=tls))
try:
    direct.open(url, timeout=5).close()
except OSError as error:  # urllib's errors, an answer other than 200 among them, are OSErrors
    sys.exit(f"{url}: {error}")

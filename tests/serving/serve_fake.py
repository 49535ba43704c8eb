"""A server of the fake model without the command line: `python serve_fake.py PORT [FRONTEND ...]`."""

import sys

from autoflux.plugin_manager import load_plugins
from autoflux.serving import app
from autoflux.serving.process import Deadlines
from autoflux.serving.server import Stopping, open_port, run_server
from autoflux.serving.service import Service
from autoflux.serving.supervisor import Supervisor
from autoflux.testing import fake_model, fake_prepare


def main() -> None:
    plugins = load_plugins()
    frontends = [plugins.frontends.get(name) for name in sys.argv[2:]]
    listening = open_port("127.0.0.1", int(sys.argv[1]))
    stopping = Stopping()
    supervisor = Supervisor(Deadlines(step_seconds=2.0), first_pause_seconds=0.05)
    service = Service(fake_model(), supervisor, max_queued=20)

    def make_app():
        return app.make_app(service, plugins.frontends.get("api"), frontends, on_failed=stopping.fail)

    with stopping.taking_signals():
        print(listening.getsockname()[1], flush=True)
        service.start(fake_prepare, stopping.fail)
        run_server(service, listening, make_app, stopping)
    print("torch" in sys.modules, flush=True)
    if stopping.error:
        sys.exit(f"failed: {stopping.error.message}")
    sys.exit(128 + (stopping.signal or -128))


if __name__ == "__main__":
    main()

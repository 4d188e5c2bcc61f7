"""A plugin of pytest, `-p tests.at_once`: a failure is printed when it happens, too, and a run may then be killed."""


class AtOnce:
    def __init__(self, config):
        self.config = config

    def pytest_runtest_logreport(self, report):
        if report.failed:
            terminal = self.config.pluginmanager.get_plugin("terminalreporter")
            terminal.ensure_newline()
            terminal.write_line(f"{report.nodeid}, {report.when}:\n{report.longreprtext}")
            terminal.flush()


def pytest_configure(config):
    # Those that xdist starts send their reports to the process that has the terminal.
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(AtOnce(config))

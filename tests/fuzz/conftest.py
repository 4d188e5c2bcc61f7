from tests.fuzz.report import summary


def pytest_terminal_summary(terminalreporter):
    summary(terminalreporter)

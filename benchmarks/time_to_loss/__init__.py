"""Seconds to a loss over slow links: strategies of ours beside other packages."""

// Browsers start no worker from a page on the disk: there, a hidden frame runs the script of the search.
if (location.protocol === "file:") {
  const load = (inside, url) => new Promise((loaded, failed) => {
    const script = inside.document.createElement("script")
    script.src = url
    script.onload = loaded
    script.onerror = failed
    inside.document.body.append(script)
  })

  class IFrameWorker extends EventTarget {
    constructor(url) {
      super()
      const frame = document.createElement("iframe")
      frame.hidden = true
      frame.srcdoc = "<body></body>"
      this.started = new Promise(ready => { frame.onload = ready }).then(() => {
        const inside = frame.contentWindow
        inside.postMessage = data => this.dispatchEvent(new MessageEvent("message", { data }))
        inside.importScripts = (...urls) =>
          urls.reduce((before, each) => before.then(() => load(inside, each)), Promise.resolve())
        return load(inside, url).then(() => inside)
      })
      document.body.append(frame)
    }

    postMessage(data) {
      this.started.then(inside => inside.dispatchEvent(new MessageEvent("message", { data })))
    }

    terminate() {}
  }

  window.IFrameWorker = window.Worker = IFrameWorker // the first is a name that the search looks for
}

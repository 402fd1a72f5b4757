// A page that is read from the file system may not start a Worker. There, search runs its script in a hidden frame.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      this.waiting = [];
      document.body.append(frame);
      this.inside = frame.contentWindow;
      const page = frame.contentDocument;
      // The script is a worker's: it answers with postMessage, and loads others with importScripts.
      this.inside.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
      this.inside.importScripts = (...names) =>
        names.reduce((before, name) => before.then(() => this.load(page, new URL(name, url))), Promise.resolve());
      this.load(page, url).then(() => {
        this.ready = true;
        this.waiting.forEach((data) => this.postMessage(data));
      });
    }

    load(page, url) {
      return new Promise((resolve, reject) => {
        const script = page.createElement("script");
        Object.assign(script, { src: url, onload: resolve, onerror: reject });
        page.body.append(script);
      });
    }

    postMessage(data) {
      if (this.ready) this.inside.dispatchEvent(new MessageEvent("message", { data }));
      else this.waiting.push(data);
    }
  };
}
